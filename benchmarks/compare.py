"""Stock PEFT, PEFT tuned, this toolkit and the bare base: seconds and bytes of a training step, case by case.

    python benchmarks/compare.py --out FOLDER [--quick | --tiny | --host] [--model PATH] [--docs docs/benchmarks.md]

Every system has a process to itself, and they take turns: in every round each makes its steps while the others wait.
A ratio is taken in each round, and their median is shown, so that a machine which slows down for a while slows down
both sides. Bytes are counted, not sampled. Writes results.json and results.md after every case. After a kill the same
command continues with the case that was being measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compare_cases import CASES, lowest_layer
from compare_job import BARE, STOCK, TOOLKIT, TUNED, Data, Job
from compare_processes import Pool, Process
from compare_tables import page, write_between_markers
from harness import argument_parser

from sparse_llm_ft.plan import Shape

ALL = tuple(CASES)
MAIN = ("lora", "weight_lora after T, top tenth", "lora, dropout .05")


@dataclass(frozen=True)
class Group:
    """Cases on the same base and data.

    Attributes:
        timed: whether seconds are measured, beside bytes.
        profiled: of which cases to show where the time goes.
        communicating: whether to count what two ranks send.
    """

    data: Data
    cases: Sequence[str]
    timed: bool
    profiled: Sequence[str] = ()
    communicating: bool = False


def full(base: str) -> list[Group]:
    """Everything: seconds in the dtypes that the CPU multiplies fast, bytes in all."""
    main = Data(base, "float32", "none", 2, 256, "half")
    wider = [
        replace(main, supervised="all"),
        *(replace(main, batch=4, length=512, supervised=s) for s in ("half", "all")),
    ]
    in_bfloat16 = partial(replace, dtype="bfloat16")
    fast = bfloat16_is_fast()
    nf4 = replace(main, quantization="nf4")
    return [
        Group(main, ALL, True, MAIN, True),
        Group(in_bfloat16(main), ALL, fast, communicating=True),
        Group(nf4, MAIN, True),
        Group(in_bfloat16(nf4), MAIN, fast),
        *(Group(data, MAIN, True) for data in wider),
        *(Group(in_bfloat16(data), MAIN, False) for data in wider),
    ]


def quick(base: str) -> list[Group]:
    """One case."""
    return [Group(Data(base, "float32", "none", 2, 256, "half"), ["lora"], True, ["lora"])]


def tiny(base: str) -> list[Group]:
    """For the tests."""
    return [Group(Data(base, "float32", "none", 2, 32, "half"), ["lora"], True, ["lora"])]


def host(base: str) -> list[Group]:
    """What Python and torch's dispatcher take: a narrow base with as many layers as Llama-3-8B, and few tokens."""
    data = Data(base, "float32", "none", 1, 16, "half")
    return [Group(data, MAIN[:2], True), Group(replace(data, quantization="nf4"), MAIN[:2], True)]


def jobs_of(case: str, data: Data, zero_stage: int, shapes: Mapping[str, Shape]) -> dict[str, Job]:
    """System -> its job."""
    dropout, lowest = CASES[case].dropout, lowest_layer(CASES[case].plan(shapes))
    return {
        STOCK: Job(STOCK, data, dropout=dropout),
        TUNED: Job(TUNED, data, dropout=dropout),
        TOOLKIT: Job(TOOLKIT, data, case, zero_stage),
        BARE: Job(BARE, data, lowest=lowest),
    }


def alternate(running: Mapping[str, Process], rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Rounds in which each system makes its steps, by turns; another one begins each round.

    Returns:
        System -> what it answered in each round.
    """
    answers: dict[str, list[dict[str, Any]]] = {system: [] for system in running}
    for i in range(rounds):
        for turn in range(len(running)):
            system = list(running)[(i + turn) % len(running)]
            answers[system].append(running[system].ask("steps", count=steps))
    return answers


def measure(case: str, group: Group, jobs: Mapping[str, Job], pool: Pool, rounds: int, steps: int) -> dict[str, Any]:
    """All systems on one case."""
    running = {system: pool.process(job) for system, job in jobs.items()}
    timed = alternate(running, rounds, steps) if group.timed else {system: [] for system in running}
    found: dict[str, dict[str, Any]] = {}
    for system, process in running.items():
        found[system] = {"bytes": process.once("bytes"), "rounds": timed[system]}
        if case in group.profiled:
            found[system]["profile"] = process.ask("profile", count=3)
        if group.communicating and system != BARE:
            # Neither the batch nor its length changes what is sent.
            short = replace(jobs[system], data=replace(group.data, batch=1, length=16))
            found[system]["communicated"] = pool.of_two_ranks(short, "communication")
    job = jobs[TOOLKIT]
    data = {name: value for name, value in asdict(job.data).items() if name != "base"}
    return {"case": case, "title": str(job.data), "data": data, "zero_stage": job.zero_stage, "systems": found}


def run(groups: Sequence[Group], options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure all groups; writes what is known after each case."""
    from sparse_llm_ft.adapters import find_targets
    from sparse_llm_ft.config import ModelConfig
    from sparse_llm_ft.model.loading import empty_model

    done = {(row["title"], row["case"]) for row in results["rows"]}
    for group in groups:
        shapes = find_targets(empty_model(ModelConfig(name=group.data.base)), "all-linear")
        wanted = {case: jobs_of(case, group.data, options.zero_stage, shapes) for case in group.cases}
        with tempfile.TemporaryDirectory() as logs, Pool(Path(logs)) as pool:
            for i, case in enumerate(group.cases):
                if (str(group.data), case) in done:
                    continue
                began = time.monotonic()
                results["rows"].append(measure(case, group, wanted[case], pool, options.rounds, options.steps))
                (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                (options.out / "results.md").write_text(page(results), encoding="utf-8")
                print(f"{group.data}: {case}, {time.monotonic() - began:.0f} s", flush=True)
                pool.keep({job for later in group.cases[i + 1 :] for job in wanted[later].values()})


def continued(results: dict[str, Any], file: Path) -> dict[str, Any]:
    """The results with the rows of a file of the same command and machine; exits if the file is of another one."""
    if not file.exists():
        return results
    old: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [key for key, value in results.items() if key != "rows" and old.get(key) != value]
    if other:
        sys.exit(f"{file}: its {', '.join(other)} differ from this run's; remove it or name another --out")
    return old


def bfloat16_is_fast() -> bool:
    """Whether the CPU multiplies bfloat16 matrices by itself (AVX512-BF16, AMX)."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """The features that the kernel lists; empty where it lists none."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def describe_machine() -> str:
    """Cores and those features that matter for matrix products."""
    told = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd") if flag in cpu_flags()]
    return f"{len(os.sched_getaffinity(0))} CPU cores ({', '.join(told)})"


def versions() -> str:
    """Of the libraries that are compared."""
    names = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
    return ", ".join(f"{name} {version(name)}" for name in names)


def command(arguments: Sequence[str]) -> str:
    """The command line for people, without names of folders."""
    shown = [*arguments]
    for i, option in enumerate(arguments[:-1]):
        if option in ("--out", "--model"):
            shown[i + 1] = "FOLDER"
    return shlex.join(["python", "benchmarks/compare.py", *shown])


def write_base(folder: Path, narrow_layers: int | None) -> str:
    """A checkpoint of random float32 weights in the shapes of SmolLM2-135M, or of a narrow Llama of so many layers."""
    import torch
    from bases import random_base, smollm2_135m, tiny_llama

    config = smollm2_135m() if narrow_layers is None else tiny_llama(narrow_layers)
    random_base(config, "none", torch.device("cpu"), torch.float32).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Measure all cases and write the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one case in three rounds")
    size.add_argument("--tiny", action="store_true", help="one case on a narrow Llama, in three rounds")
    size.add_argument("--host", action="store_true", help="a narrow Llama of 32 layers: what Python takes of a step")
    parser.add_argument("--model", help="a checkpoint; default: random weights in SmolLM2-135M's shapes")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="only these")
    parser.add_argument(
        "--groups", nargs="+", help="only those with one of these in their headings, such as 'float32, 4×512'"
    )
    parser.add_argument("--bytes-only", action="store_true", help="no seconds, for a machine that is not idle")
    parser.add_argument("--rounds", type=int, help="default: 5, or 3 with --quick and --tiny")
    parser.add_argument("--steps", type=int, default=1, help="of a system in a round")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    parser.add_argument("--docs", type=Path, help="a Markdown file; the tables replace what is between its markers")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick or options.tiny else 5)
    make = quick if options.quick else tiny if options.tiny else host if options.host else full
    layers = 4 if options.tiny else 32 if options.host else None
    headings = [str(group.data) for group in make("")]
    for part in options.groups or ():
        if not any(part in heading for heading in headings):
            parser.error(f"--groups: '{part}' is in no heading; expected a part of one, such as '{headings[0]}'")
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": command(sys.argv[1:]),
        "machine": describe_machine(),
        "versions": versions(),
        "rounds": options.rounds,
    }
    results |= {"steps": options.steps, "base": "a checkpoint" if options.model else "random weights", "rows": []}
    results = continued(results, options.out / "results.json")
    with tempfile.TemporaryDirectory() as temporary:
        groups = make(options.model or write_base(Path(temporary), layers))
        if options.groups:
            groups = [group for group in groups if any(part in str(group.data) for part in options.groups)]
        if options.cases:
            groups = [replace(g, cases=[case for case in g.cases if case in options.cases]) for g in groups]
        if options.bytes_only:
            groups = [replace(group, timed=False, profiled=()) for group in groups]
        run(groups, options, results)
    text = page(results)
    if options.docs:
        write_between_markers(options.docs, text)
    print(text)


if __name__ == "__main__":
    main()
