"""One system of `compare.py` in a process of its own. Reads commands from its input, answers in lines of JSON.

Started by compare.py alone, with a `Job` as its argument.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare_job import BARE, STOCK, TOOLKIT, Job
from harness import start


class Worker:
    """The system, built; the commands that compare.py sends are its methods."""

    def __init__(self, job: Job) -> None:
        import torch
        from watching import Meter

        self.job, self.data, self.world, self.meter = job, job.data, start(), Meter()
        settings = json.loads((Path(self.data.base) / "config.json").read_text(encoding="utf-8"))
        self.vocabulary: int = settings["vocab_size"]
        draw = torch.Generator().manual_seed(1)
        shape = (self.data.batch * self.world.size, self.data.length)
        self.tokens = torch.randint(3, self.vocabulary, shape, generator=draw)
        self.system = self._toolkit() if job.system == TOOLKIT else self._other()

    def steps(self, count: int) -> dict[str, Any]:
        """Make steps: their seconds, seconds of their parts, losses."""
        found: dict[str, Any] = {"step": [], "parts": [], "losses": []}
        for _ in range(count):
            self.meter.seconds = {}
            began = time.perf_counter()
            found["losses"].append(self.system.step())
            found["step"].append(time.perf_counter() - began)
            found["parts"].append(self.meter.seconds)
        return found

    def bytes(self) -> dict[str, int]:
        """Count the bytes of a step: kept for backward, alive, of gradients, of the optimizer."""
        from peft_steps import nbytes
        from watching import KeptBytes, nothing, step_memory

        kept, gradients = KeptBytes(self.system.model), [0]
        self.meter.around_forward = kept.watch
        self.meter.after_backward = lambda: gradients.append(nbytes(self.system.gradients()))
        alive = step_memory(self.system.step)
        self.meter.around_forward, self.meter.after_backward = nullcontext, nothing
        optimizer = self.system.optimizer_bytes()
        return {"kept": kept.total, "gradients": gradients[-1], "optimizer": optimizer, **asdict(alive)}

    def communication(self) -> dict[str, Any]:
        """Count what a step hands to collectives, after those in which DistributedDataParallel agrees on buckets."""
        from watching import Communicated

        self.system.step()
        with Communicated() as counted:
            self.system.step()
        return {"bytes": counted.bytes, "calls": counted.calls}

    def profile(self, count: int) -> dict[str, dict[str, float]]:
        """Where `count` steps spend their time: part -> kind of work -> milliseconds of a step."""
        from compare_cases import RANK
        from compare_profile import profile

        return profile(self.system.step, count, RANK, self.vocabulary)

    def _toolkit(self) -> Any:
        from compare_cases import CASES
        from toolkit_step import loop_step

        from sparse_llm_ft.adapters import find_targets
        from sparse_llm_ft.config import RunConfig
        from sparse_llm_ft.data.samples import Sample
        from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
        from sparse_llm_ft.engine.build import build_model, engine_settings
        from sparse_llm_ft.engine.engine import init_distributed
        from sparse_llm_ft.io.console import Console
        from sparse_llm_ft.model.loading import empty_model
        from sparse_llm_ft.phase import Phase

        data, case, total = self.data, CASES[self.job.case], self.data.batch * self.world.size
        training = {"micro_batch_size": data.batch, "global_batch_size": total, "max_steps": 10**6}
        config = RunConfig.model_validate(
            {
                "model": {"name": data.base, "dtype": data.dtype, "quantization": data.quantization, **case.model},
                "task": {"name": "custom"},
                "method": {"name": "lora"},
                "training": {**training, "schedule": "constant", **case.training},
                "deepspeed": {"zero_stage": self.job.zero_stage},
                "output_dir": "unused",
            }
        )
        init_distributed()
        plan = case.plan(find_targets(empty_model(config.model), "all-linear"))
        phase = Phase("compared", plan, cut=case.cut, omega_lr=0.01).with_batch(data.batch, total)
        settings = engine_settings(config, phase, self.world.size)
        console = Console(self.world.rank)
        model = build_model(config, CAUSAL_LM, plan, settings.to_deepspeed(), self.world, console)
        rows = self.tokens.tolist()
        samples = [Sample(tuple(row[: data.prompt]), tuple(row[data.prompt :])) for row in rows]
        return loop_step(model, phase, samples, settings, config.training, self.world, self.meter)

    def _other(self) -> Any:
        import torch
        from compare_cases import ALPHA, RANK
        from peft_steps import Training, bare_base, stock_peft, tuned_peft
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        job, data = self.job, self.data
        dtype = getattr(torch, data.dtype)
        options: dict[str, Any] = {}
        if data.quantization != "none":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=data.quantization,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_storage=dtype,
            )
        base = AutoModelForCausalLM.from_pretrained(data.base, dtype=dtype, **options)
        base.config.use_cache = False
        first = self.world.rank * data.batch
        tokens = self.tokens[first : first + data.batch]
        training = Training(base, tokens, data.prompt, data.dtype == "bfloat16", RANK, ALPHA, self.meter)
        if self.world.size > 1:
            torch.distributed.init_process_group("gloo")
            training.wrap = torch.nn.parallel.DistributedDataParallel
        if job.system == BARE:
            return bare_base(training, job.lowest)
        return (stock_peft if job.system == STOCK else tuned_peft)(training, job.dropout)


def main() -> None:
    """Build the system, say so, and answer commands until the input ends."""
    # Libraries print on the standard output: it becomes the standard error, and answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(Job.read(json.loads(sys.argv[1])))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(worker, command.pop("do"))(**command)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
