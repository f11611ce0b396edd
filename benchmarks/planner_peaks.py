"""The planner's peaks beside the step's (loading, a save, an evaluation, the change of phases), beside real ones.

    python benchmarks/planner_peaks.py --model FOLDER [--stages 0 2 3]

FOLDER is SmolLM2-135M-Instruct, whose tokenizer a random Llama takes. WeightLoRA's first phase is loaded, makes steps,
is saved and evaluated, with and without generated texts, and gives way to its last phase, as in a run. The bytes of all
tensors are counted meanwhile (`Everything`): on a CPU, the host's are among them. Stage 0 runs on one rank, the others
on two, over gloo; each peak is that of the rank that has most.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from dataclasses import replace
from typing import Any

from harness import argument_parser, print_table, start
from planner_truth import MARK, launch
from truth_cases import Case, opened, random_base, samples_of

PEAKS = ("load", "save", "evaluate", "generate", "change")


def cases_at(stages: list[int]) -> list[Case]:
    """Each stage in bf16 and nf4; stage 0 on one rank, the others on two."""
    return [
        Case("random", 2 if stage else 1, stage, "weight_lora", quantization=kind, length=256, checkpointing=True)
        for stage in stages
        for kind in ("none", "nf4")
    ]


def main() -> None:
    """Run the cases in processes of their own, and print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 2, 3])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"random": random_base(options.model, folder)}
        cases = cases_at(options.stages)
        for ranks in sorted({case.ranks for case in cases}):
            own = [case for case in cases if case.ranks == ranks]
            for case, real in launch(models, own, ranks, script=__file__):
                planned = plan(case, models)
                cells = [f"{real[key] / 2**20:.1f} ({(planned[key] - real[key]) / real[key]:+.1%})" for key in PEAKS]
                rows.append([case.name, *cells])
    print_table(["case", *PEAKS], rows)


def plan(case: Case, models: dict[str, str]) -> dict[str, int]:
    """What the planner says of the case."""
    from sparse_llm_ft.planning.forecast import forecast

    context, sizes = evaluating(case, models)
    first = forecast(context, case.ranks, sizes, on_gpu=False).phases[0]
    return {**first.peaks, "generate": first.generation}


def evaluating(case: Case, models: dict[str, str]) -> tuple[Any, Any]:
    """As `opened`, with an evaluation of four samples at a time, of their loss and of generated texts."""
    context, sizes = opened(case, models)
    evaluation = context.config.evaluation.model_copy(
        update={"samples": 4, "micro_batch_size": 4, "max_new_tokens": 16}
    )
    return replace(context, config=context.config.model_copy(update={"evaluation": evaluation})), sizes


def child(models: dict[str, str], cases: list[Case]) -> None:
    """Run the cases on this rank; rank 0 prints. Collective."""
    world = start()
    from peaks_run import real_peaks

    from sparse_llm_ft.engine.engine import init_distributed

    init_distributed()
    for case in cases:
        context, sizes = evaluating(case, models)
        result = real_peaks(context, sizes, samples_of(replace(case, batch=4)), world)
        gc.collect()
        if world.rank == 0:
            print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    if "--child" in sys.argv:
        where = sys.argv.index("--child")
        child(json.loads(sys.argv[where + 1]), [Case(**case) for case in json.loads(sys.argv[where + 2])])
    else:
        main()
