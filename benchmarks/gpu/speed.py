"""One system's training step on a random Llama: time, tokens/s, share of the card's peak, bytes. One JSON line.

    python benchmarks/gpu/speed.py --system lora --quantization none [--device cpu --tiny] [--wait]

A system has its process to itself, so that what one leaves in the allocator is not counted as another's. With `--wait`
the process imports what it needs, prints "ready", and begins when it reads a line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from base import host_profile, profile, step_flops, times, waits
from bases import llama_3_8b, random_base, tiny_llama
from compare_cases import top_tenth
from peft_steps import Step, Training, bare_base, liger_peft, stock_peft, tuned_peft

from sparse_llm_ft.model.flops import peak_flops
from sparse_llm_ft.model.fused import Fused

RANK, ALPHA = 16, 32


def sizes_of(tiny: bool) -> tuple[int, int]:
    """Samples of a step, and tokens of each."""
    return (2, 32) if tiny else (4, 1024)


class Setup:
    """What all systems train on: the base and one batch, whose samples are half prompt and half completion."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.config = tiny_llama() if options.tiny else llama_3_8b()
        self.batch, self.length = sizes_of(options.tiny)
        base = random_base(self.config, options.quantization, self.device)
        draw = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, self.config.vocab_size, (self.batch, self.length), generator=draw)
        self.training = Training(base, tokens.to(self.device), self.length // 2, True, RANK, ALPHA)

    @property
    def lowest_of_top_tenth(self) -> int:
        """The lowest layer of the highest tenth."""
        layers = self.config.num_hidden_layers
        return layers - max(1, layers // 10)


def ours(
    setup: Setup,
    dropout: float = 0.0,
    cuts_after: int | None = None,
    top: bool = False,
    compiled: bool = False,
    cached: bool = False,
    zero_stage: int = 2,
) -> Step:
    """This toolkit: its tuner, its engine and its loop; adapters in all layers or in the top tenth, and omegas of which
    a cut follows every step after so many.
    """
    from toolkit_step import loop_step

    from sparse_llm_ft.adapters import add_adapters, find_targets
    from sparse_llm_ft.config import TrainingConfig
    from sparse_llm_ft.data.samples import Sample
    from sparse_llm_ft.distributed.world import find_world
    from sparse_llm_ft.engine.engine import init_distributed
    from sparse_llm_ft.engine.settings import EngineSettings
    from sparse_llm_ft.model.four_bit import release_weights
    from sparse_llm_ft.model.layers import compile_layers
    from sparse_llm_ft.model.lean import make_lean
    from sparse_llm_ft.phase import CutRule, Phase
    from sparse_llm_ft.plan import uniform_plan, with_omega

    world = find_world()
    init_distributed()
    training, batch = setup.training, setup.batch
    make_lean(training.base)  # as `load_model` does it
    release_weights(training.base)
    shapes = find_targets(training.base, "all-linear")
    plan = uniform_plan(shapes, RANK, ALPHA, dropout)
    plan = top_tenth(plan, shapes) if top else plan
    cut = None if cuts_after is None else CutRule(keep=22, steps=10**6, after=cuts_after)
    plan = plan if cut is None else with_omega(plan)
    rows = training.tokens.tolist()
    samples = [Sample(tuple(row[: training.prompt]), tuple(row[training.prompt :])) for row in rows]
    settings = TrainingConfig(
        max_steps=10**6,
        micro_batch_size=batch,
        global_batch_size=batch,
        learning_rate=1e-4,
        schedule="constant",
        prefix_cache="memory" if cached else "off",
    )
    model = add_adapters(training.base, plan)
    if compiled:
        compile_layers(model)
    return loop_step(
        model,
        Phase("speed", plan, cut=cut).with_batch(batch, batch),
        samples,
        EngineSettings(zero_stage, "bfloat16", batch, 1, 1.0, 0.0, 0.01, "sgd", {}),
        settings,
        world,
        training.meter,
    ).step


SYSTEMS: dict[str, tuple[Callable[[Setup], Step], bool]] = {
    "stock PEFT": (lambda s: stock_peft(s.training, 0.0).step, False),
    "stock PEFT, dropout .05": (lambda s: stock_peft(s.training, 0.05).step, False),
    "PEFT tuned": (lambda s: tuned_peft(s.training, 0.0).step, False),
    "PEFT with Liger": (lambda s: liger_peft(s.training, 0.0).step, False),
    "bare base": (lambda s: bare_base(s.training, 0).step, False),
    "bare base, top tenth": (lambda s: bare_base(s.training, s.lowest_of_top_tenth).step, True),
    "lora": (ours, False),
    "lora, ZeRO-1": (lambda s: ours(s, zero_stage=1), False),
    "lora, compiled": (lambda s: ours(s, compiled=True), False),
    "lora, dropout .05": (lambda s: ours(s, dropout=0.05), False),
    "weight_lora before its first cut": (lambda s: ours(s, cuts_after=10**5), False),
    "weight_lora before T": (lambda s: ours(s, cuts_after=0), False),
    "weight_lora after T, top tenth": (lambda s: ours(s, top=True), True),
    "weight_lora after T, top tenth, compiled": (lambda s: ours(s, top=True, compiled=True), True),
    "weight_lora after T, top tenth, prefix cache": (lambda s: ours(s, top=True, cached=True), True),
}
"""Name -> how its step is made, and whether it has adapters in the top tenth of the layers alone."""


def main() -> None:
    """Measure one system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--wait", action="store_true", help="import everything, and begin when a line is read")
    options = parser.parse_args()
    if options.wait:
        importlib.import_module("toolkit_step")
        print("ready", flush=True)  # run.py's READY
        if not sys.stdin.readline():
            return  # run.py has ended
    began = time.perf_counter()
    setup = Setup(options)
    make, top = SYSTEMS[options.system]
    cuda = setup.device.type == "cuda"
    base_bytes = torch.cuda.memory_allocated() if cuda else None
    step = make(setup)
    losses = [step()]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found, host = times(step, setup.device, warmup=2, count=options.steps)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    losses.append(step())
    milliseconds = statistics.median(found)
    device_ms, operations = profile(step, setup.device)
    tokens = setup.batch * setup.length
    lowest = setup.lowest_of_top_tenth if top else 0
    cached = "prefix cache" in options.system
    flops = step_flops(setup.config, tokens, setup.length, supervised=0.5, lowest=lowest, cached=cached)
    rate = flops / milliseconds / 1e9
    card = peak_flops(setup.device)
    result = {
        "system": options.system,
        "base": options.quantization,
        "batch": setup.batch,
        "length": setup.length,
        "step_ms": milliseconds,
        "all_ms": found,
        "host_ms": host,
        "tokens_per_second": 1000 * tokens / milliseconds,
        "tflops": rate,
        "mfu": None if card is None else 1e12 * rate / card,
        "base_bytes": base_bytes,
        "peak_bytes": peak,
        "losses": losses,
        "device_ms": device_ms,
        "profile": operations,
        "waits": waits(step, setup.device),
        "host_profile": host_profile(step),
        "not_fused": Fused.problem,
        "seconds": time.perf_counter() - began,
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
