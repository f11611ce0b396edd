"""One system of `compare.py` in a process of its own. Reads commands from its input, answers in lines of JSON.

Started by compare.py alone, with a `Job` as its argument.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from harness import start

STOCK, TUNED, TOOLKIT, BARE = "stock PEFT", "PEFT tuned", "toolkit", "bare base"
SYSTEMS = (STOCK, TUNED, TOOLKIT, BARE)


@dataclass(frozen=True)
class Job:
    """What a worker runs.

    Attributes:
        system: one of `SYSTEMS`.
        case: a name in `compare_cases.CASES`.
        base: folder of the base.
        dtype: of the weights that are not quantised, and of the computation.
        batch: samples of a step and rank.
        prompt: tokens of each sample without loss, at least 1: nothing predicts the first.
        zero_stage: of the toolkit.
    """

    system: str
    case: str
    base: str
    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["none", "nf4"]
    batch: int
    length: int
    prompt: int
    zero_stage: int

    @property
    def key(self) -> str:
        """What other jobs of the same base and data share: ``float32 2x256 half``."""
        supervised = "all" if self.prompt == 1 else "half"
        held = self.dtype if self.quantization == "none" else f"{self.quantization} in {self.dtype}"
        return f"{held}, {self.batch}x{self.length}, {supervised} supervised"


class Worker:
    """The system, built; the commands that compare.py sends are its methods."""

    def __init__(self, job: Job) -> None:
        import torch
        from watching import Meter

        self.job, self.world, self.meter = job, start(), Meter()
        vocabulary = json.loads((Path(job.base) / "config.json").read_text())["vocab_size"]
        draw = torch.Generator().manual_seed(1)
        shape = (job.batch * self.world.size, job.length)
        self.tokens = torch.randint(3, vocabulary, shape, generator=draw)
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
        """Count bytes, in two steps: kept for backward and of gradients; alive."""
        from peft_steps import nbytes
        from watching import KeptBytes, nothing, step_memory

        kept, gradients = KeptBytes(self.system.model), [0]
        self.meter.around_forward = kept.watch
        self.meter.after_backward = lambda: gradients.append(nbytes(self.system.gradients()))
        self.system.step()
        self.meter.around_forward, self.meter.after_backward = nullcontext, nothing
        alive = step_memory(self.system.step)
        optimizer = self.system.optimizer_bytes()
        return {"kept": kept.total, "gradients": gradients[-1], "optimizer": optimizer, **asdict(alive)}

    def communication(self) -> dict[str, Any]:
        """Count what a step hands to collectives."""
        from watching import Communicated

        with Communicated() as counted:
            self.system.step()
        return {"bytes": counted.bytes, "calls": counted.calls}

    def _toolkit(self) -> Any:
        from compare_cases import CASES
        from toolkit_step import loop_step

        from sparse_llm_ft.adapters import find_targets
        from sparse_llm_ft.config import RunConfig
        from sparse_llm_ft.data.samples import Sample
        from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
        from sparse_llm_ft.engine.build import build_model, engine_settings
        from sparse_llm_ft.engine.engine import init_distributed
        from sparse_llm_ft.model.loading import empty_model
        from sparse_llm_ft.phase import Phase

        job, case, total = self.job, CASES[self.job.case], self.job.batch * self.world.size
        config = RunConfig.model_validate(
            {
                "model": {"name": job.base, "dtype": job.dtype, "quantization": job.quantization, **case.model},
                "task": {"name": "custom"},
                "method": {"name": "lora"},
                "training": {
                    "micro_batch_size": job.batch,
                    "global_batch_size": total,
                    "max_steps": 10**6,
                    "schedule": "constant",
                    **case.training,
                },
                "deepspeed": {"zero_stage": job.zero_stage},
                "output_dir": "unused",
            }
        )
        init_distributed()
        plan = case.plan(find_targets(empty_model(config.model), "all-linear"))
        phase = Phase("compared", plan, cut=case.cut, omega_lr=0.01).with_batch(job.batch, total)
        settings = engine_settings(config, phase, self.world.size)
        model = build_model(config, CAUSAL_LM, plan, settings.to_deepspeed())
        rows = self.tokens.tolist()
        samples = [Sample(tuple(row[: job.prompt]), tuple(row[job.prompt :])) for row in rows]
        return loop_step(model, phase, samples, settings, config.training, self.world, self.meter)

    def _other(self) -> Any:
        import torch
        from compare_cases import ALPHA, CASES, RANK, lowest_layer
        from peft_steps import Training, bare_base, stock_peft, tuned_peft
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        from sparse_llm_ft.adapters import find_targets

        job, case = self.job, CASES[self.job.case]
        dtype = getattr(torch, job.dtype)
        options: dict[str, Any] = {}
        if job.quantization != "none":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=job.quantization,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_storage=dtype,
            )
        base = AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype, **options)
        base.config.use_cache = False
        rank = self.world.rank
        tokens = self.tokens[rank * job.batch : (rank + 1) * job.batch]
        training = Training(base, tokens, job.prompt, job.dtype == "bfloat16", RANK, ALPHA, self.meter)
        if job.system == BARE:
            return bare_base(training, lowest_layer(case.plan(find_targets(base, "all-linear"))))
        return (stock_peft if job.system == STOCK else tuned_peft)(training, case.dropout)


def main() -> None:
    """Build the system, say so, and answer commands until the input ends."""
    # Libraries print on the standard output: it becomes the standard error, and answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(Job(**json.loads(sys.argv[1])))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(worker, command.pop("do"))(**command)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
