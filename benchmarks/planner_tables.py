"""The tables of docs/planning.md: what Llama-2-7B and Llama-3-8B need on each GPU, by method, stage, type and length.

    python benchmarks/planner_tables.py --store FILE [--models llama-2-7b llama-3-8b] [--lengths 1024 4096 8192]
        [--docs docs/planning.md]

Only the models' shapes are used. Every cell is the peak of a step of one sample on one GPU, in GiB, on 1 / 8 / 16 / 32
GPUs; one number if these are equal, and two with an arrow for a method whose last phase differs from its first. The
assumed CUDA context, NCCL and allocator are included. Layers are checkpointed, and the loss is taken at every position.
32 samples make a step, so that one GPU accumulates 32 micro-steps. A second table of each model has memory and
communication on 64 to 512 GPUs, with one sample of 4,096 tokens a GPU and step. `--docs` replaces the tables in that
file.

A step is traced once for each plan, type and length, for all stages and numbers of GPUs. FILE keeps every number: the
same command continues after a kill. Begin a new one when the planner has changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare_tables import table
from harness import argument_parser, start

from tables import write_part

if TYPE_CHECKING:
    from sparse_llm_ft.context.context import RunContext
    from sparse_llm_ft.planning.forecast import RunForecast

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}
"""From the models' own config.json."""

WORLDS, MANY, BATCH = (1, 8, 16, 32), (64, 128, 256, 512), 32
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "weight_lora": {"name": "weight_lora", "keep": 22, "steps": 100, "batch_growth": "none"},
    "weight_lora_plus": {"name": "weight_lora_plus", "keep": 22, "steps": 100, "batch_growth": "none"},
    "lora_drop": {"name": "lora_drop"},
    "partial_lora": {"name": "partial_lora", "ratios": "balanced", "ratio": 0.5},
}
SCALED = ("lora", "weight_lora", "partial_lora")
BASES = {"bf16": "none", "nf4": "nf4"}


def main() -> None:
    """Print the tables."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 2, 3])
    parser.add_argument("--store", type=Path, metavar="FILE", required=True)
    parser.add_argument("--docs", type=Path, metavar="FILE")
    options = parser.parse_args()
    start()
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            settings = SHAPES[model] | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            (Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
            tables = Tables(model, folder, options.stages, Store(options.store))
            lengths = [n for n in options.lengths if n <= SHAPES[model]["max_position_embeddings"]]
            for name, text in ((model, tables.by_length(lengths)), (f"{model} scaling", tables.scaling())):
                print(f"\n{name}:\n\n{text}", flush=True)
                if options.docs:
                    write_part(options.docs, name, text.rstrip())


Phases = list[tuple[int, int]]
"""Of each phase the bytes of a step's peak, and those that one GPU sends in a step."""


class Store:
    """What has been computed: a line of a file for each case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.known: dict[str, Phases] = dict(map(json.loads, lines))

    def get(self, key: str, compute: Callable[[], Phases]) -> Phases:
        """The case's phases, computed if they are not known yet."""
        if key not in self.known:
            self.known[key] = compute()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
        return self.known[key]


@dataclass(frozen=True)
class Tables:
    """One model's.

    Attributes:
        folder: has its config.json.
    """

    model: str
    folder: str
    stages: Sequence[int]
    store: Store

    def by_length(self, lengths: Sequence[int]) -> str:
        """Peaks in GiB, a column for each length."""
        rows = []
        for method, base, stage in product(METHODS, BASES, self.stages):
            cells = [
                slashed(gib(self.phases(method, base, stage, length, ranks, BATCH)) for ranks in WORLDS)
                for length in lengths
            ]
            rows.append(shown([method, base, str(stage), *cells]))
        return table(["method", "base", "ZeRO", *(f"{length:,} tokens" for length in lengths)], rows)

    def scaling(self, length: int = 4096) -> str:
        """Peaks in GiB, and GB that a GPU sends in a step, on many GPUs."""
        rows = []
        for method, base, stage in product(SCALED, BASES, self.stages):
            found = [self.phases(method, base, stage, length, ranks, ranks) for ranks in MANY]
            rows.append(shown([method, base, str(stage), slashed(map(gib, found)), slashed(map(gb_sent, found))]))
        worlds = " / ".join(map(str, MANY))
        header = [f"memory on {worlds} GPUs, GiB", f"sent by each in a step on {worlds}, GB"]
        return table(["method", "base", "ZeRO", *header], rows)

    def phases(self, method: str, base: str, stage: int, length: int, ranks: int, batch: int) -> Phases:
        """A run's phases, from the store or the planner.

        Args:
            batch: samples of a step, of all ranks.
        """

        def compute() -> Phases:
            found = forecasts(self.folder, method, base, stage, length, ranks, batch).phases
            return [(phase.peaks["step"], phase.communicated_bytes_per_step) for phase in found]

        key = f"{self.model}, {method}, {base}, ZeRO-{stage}, {length} tokens, {ranks} GPUs, batch {batch}"
        return self.store.get(key, compute)


def shown(row: list[str]) -> list[str]:
    """The row, which is also shown on standard error as it is made."""
    print(*row, sep="  ", file=sys.stderr, flush=True)
    return row


def gib(phases: Phases) -> str:
    """The first phase's peak, and the last one's where it differs."""
    return " → ".join(dict.fromkeys(f"{phase[0] / 2**30:.1f}" for phase in (phases[0], phases[-1])))


def gb_sent(phases: Phases) -> str:
    """What one GPU sends in a step of the first phase, and of the last one where it differs."""
    return " → ".join(dict.fromkeys(f"{phase[1] / 1e9:.3g}" for phase in (phases[0], phases[-1])))


def slashed(texts: Iterable[str]) -> str:
    """One text for each number of GPUs, or a single one if all are equal."""
    found = list(texts)
    return " / ".join(found if len(set(found)) > 1 else found[:1])


def forecasts(folder: str, method: str, base: str, stage: int, length: int, ranks: int, batch: int) -> RunForecast:
    """A run's phases.

    Args:
        batch: samples of a step, of all ranks.
    """
    from sparse_llm_ft.planning.forecast import forecast
    from sparse_llm_ft.planning.samples import SampleSizes

    context = opened(folder, method, base)
    config = context.config
    changed = config.model_copy(
        update={
            "task": config.task.model_copy(update={"max_length": length}),
            "training": config.training.model_copy(update={"global_batch_size": batch}),
            "deepspeed": config.deepspeed.model_copy(update={"zero_stage": stage}),
        }
    )
    samples = replace(SampleSizes.assumed(length), equal=True)
    return forecast(replace(context, config=changed), ranks, samples)


@cache
def opened(folder: str, method: str, base: str) -> RunContext:
    """A run on one GPU at stage 0, of short samples."""
    from sparse_llm_ft.config import parse_config
    from sparse_llm_ft.distributed.world import ONE_PROCESS
    from sparse_llm_ft.planning.opening import open_for_planning

    config = parse_config(
        {
            "model": {"name": folder, "quantization": BASES[base], "gradient_checkpointing": True},
            "task": {"name": "custom", "path": ".", "prompt": "{a}", "completion": "{b}", "max_length": 64},
            "adapter": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
            "method": METHODS[method],
            "training": {"micro_batch_size": 1, "global_batch_size": BATCH, "max_steps": 1000},
            "evaluation": {"samples": 0},
            "deepspeed": {"zero_stage": 0},
            "output_dir": "unused",
        }
    )
    return open_for_planning(config, ONE_PROCESS)


if __name__ == "__main__":
    main()
