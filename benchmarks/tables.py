"""From finished runs to the tables and claims of docs/results.md."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev

from jobs import HELD_OUT, Result, Setting, best_rate, final_jobs

METRIC = {"glue/sst2": "SST-2, accuracy", "glue/rte": "RTE, accuracy", "glue/cola": "CoLA, Matthews"}

Cell = dict[str, dict[int, Result]]
"""Task -> seed -> result."""
Table = dict[str, Cell]
"""System -> cell."""


def collect(setting: Setting, runs: Path) -> Table:
    """Every finished final run."""
    table: Table = {}
    for job in final_jobs(setting, runs):
        result = Result.read(job.folder(runs))
        if result is not None and not math.isnan(result.metric):
            table.setdefault(job.system.name, {}).setdefault(job.task, {})[job.seed] = result
    return table


def write_results(settings: Sequence[Setting], runs: Path, output: Path) -> None:
    """Replace this reproduction's part of `output`; the rest of the file stays."""
    body = "\n".join([_introduction(), *(_section(setting, collect(setting, runs), runs) for setting in settings)])
    write_part(output, "reproduce", body)


def write_part(output: Path, name: str, body: str) -> None:
    """Replace the text between the markers of `name` in `output`, or append it; the rest of the file stays."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = output.read_text(encoding="utf-8") if output.is_file() else "# Results\n"
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2]
    if not found:
        before, after = text.rstrip() + "\n\n", "\n"
    temporary = output.with_suffix(".tmp")
    temporary.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")
    temporary.replace(output)


def _introduction() -> str:
    return f"""## The three papers on small models

```
python benchmarks/reproduce.py --models MODELS --data DATA
```

MODELS holds all-MiniLM-L6-v2 and SmolLM2-135M-Instruct (dequantised from its Q4_1 GGUF file). DATA holds GLUE's SST-2,
CoLA and RTE as JSON lines.

- **Scores** are in percent, on the beginning of GLUE's validation set: mean ± standard deviation over seeds. A value
  without ± is one seed.
- **Learning rates** come from one search for every system, on the first task and the first seed. The search starts with
  two rates and continues by their factor in the direction of the better one. It stops when the loss on {HELD_OUT}
  samples held out of the training set rises, or at a maximum number of rates. All of the system's runs use the best
  rate.
- **Parameters** are those of the last phase, by task where they differ, including heads; AdaLoRA's before its ranks are
  pruned from 12 to 8, LoRA's.
- **Places.** LoRA-drop and its baselines have adapters on query and value, all others on every linear layer (SmolLM2:
  all on query and value).
- **D_t** has 200 samples (SmolLM2: 64). A head's learning rate is fixed, apart from the adapters' rate.
- **Seconds** are CPU time of the whole run on one thread, as the median over runs: loading, derivation or pilot,
  training, evaluation. They do not depend on the machine's other load and do not include a derivation from the cache
  (–: not measured).

Both models are small and train for few steps on a part of the data. The tables compare systems with each other, not
with the papers' figures. Ablations run on SST-2. CoLA and RTE have one seed, because nothing learns them in so few
steps.
"""


def _section(setting: Setting, table: Table, runs: Path) -> str:
    if not table:
        return ""
    lines = [f"### {setting.title}", "", _conditions(setting), ""]
    titles = [METRIC[task] for task in setting.tasks]
    for paper in dict.fromkeys(system.paper for system in setting.systems):
        rows = [system for system in setting.systems if system.paper == paper and system.name in table]
        if not rows:
            continue
        lines += [f"| {paper} | {' | '.join(titles)} | trained parameters | CPU seconds | rate |"]
        lines += ["|---" * (len(titles) + 4) + "|"]
        for system in rows:
            cell = table[system.name]
            scores = [_spread([r.metric for r in cell.get(task, {}).values()]) for task in setting.tasks]
            results = [result for task in setting.tasks for result in cell.get(task, {}).values()]
            sizes = [_parameters([*cell[task].values()]) for task in setting.tasks if task in cell]
            parameters = " / ".join(dict.fromkeys(sizes))
            rate = best_rate(setting, system, runs)
            counted = [result.cpu_seconds for result in results if not math.isnan(result.cpu_seconds)]
            seconds = f"{median(counted):.0f}" if counted else "–"
            lines += [f"| {system.name} | {' | '.join(scores)} | {parameters} | {seconds} | {rate:g} |"]
        lines += [""]
    lines += _claims(setting, table, _learned(setting, table, runs))
    return "\n".join(lines)


def _conditions(setting: Setting) -> str:
    batch, seeds = setting.sections["training"]["global_batch_size"], len(setting.seeds)
    rates = " and ".join(f"{rate:g}" for rate in setting.learning_rates)
    searched = f"at most {setting.most_rates} learning rates, from {rates} on"
    if setting.most_rates == 1:
        searched = f"learning rate {rates} for all, not searched"
    return (
        f"{setting.steps} optimizer steps of {batch} samples, at most {setting.train} training and {setting.test} test "
        f"samples, r = 8, lora_alpha = 16, no dropout; {seeds} seed{'s' if seeds > 1 else ''}; "
        f"{searched}."
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _parameters(results: Sequence[Result]) -> str:
    return f"{round(mean(result.parameters for result in results)):,}"


SAME, MORE = "as good", "more"
MARGIN = 2.0
"""*As good* may be worse by this many points."""
CLEARLY = 5.0
"""A task counts as learned from this many points above the majority class."""


PUBLISHED = {
    "Partial-LoRA": ("LoRA", 0.10, 0.24),
    "Targeted-LoRA": ("LoRA", 0.10, 0.24),
    "Partial-AdaLoRA": ("AdaLoRA", 0.12, 0.26),
}
"""The unmasked system, and the least and most of its values that the paper's masks keep on GLUE (Table 6). Runs far
from them do not test the paper's claims."""

T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""The 97.5 % quantile of Student's t by degrees of freedom."""

CLAIMS = (
    ("Partial-LoRA ≈ LoRA", "Partial-LoRA", "LoRA", SAME),
    ("Partial-AdaLoRA ≈ AdaLoRA", "Partial-AdaLoRA", "AdaLoRA", SAME),
    ("Targeted ≈ Partial", "Targeted-LoRA", "Partial-LoRA", SAME),
    ("flow preservation changes nothing", "IMP, flow preservation", "Partial-LoRA, IMP", SAME),
    ("LoRA-drop ≈ LoRA", "LoRA-drop", "LoRA, query and value", SAME),
    ("sharing beats removing", "LoRA-drop", "LoRA-drop, no sharing", MORE),
    ("importance beats inverted", "LoRA-drop", "LoRA-drop, inverted", MORE),
    ("importance beats random", "LoRA-drop", "LoRA-drop, random", MORE),
    ("importance beats the top layers", "LoRA-drop", "LoRA-drop, top layers", MORE),
    ("LoRA-drop beats Sparse Adapter", "LoRA-drop", "Sparse Adapter", MORE),
    ("LoRA-drop beats Tied-LoRA", "LoRA-drop", "Tied-LoRA", MORE),
    ("LoRA-drop beats VeRA", "LoRA-drop", "VeRA, query and value", MORE),
    ("WLoRA beats RLoRA, K = 10", "WLoRA, K = 10", "RLoRA, K = 10", MORE),
    ("WLoRA beats RLoRA, K = 5", "WLoRA, K = 5", "RLoRA, K = 5", MORE),
    ("WLoRA beats RLoRA, K = 1", "WLoRA, K = 1", "RLoRA, K = 1", MORE),
    ("WLoRA+ ≥ LoRA", "WLoRA+, K = 10", "LoRA", SAME),
    ("WLoRA+ beats WLoRA", "WLoRA+, K = 10", "WLoRA, K = 10", MORE),
)
"""Of the papers: text, the system it is about, what that is compared with, and how."""


def _learned(setting: Setting, table: Table, runs: Path) -> tuple[str, ...]:
    """The tasks on which LoRA is clearly above the majority class: elsewhere nothing can be compared."""
    return tuple(
        task
        for task in setting.tasks
        if (cell := table.get("LoRA", {}).get(task))
        and mean(result.metric for result in cell.values()) > _majority(runs / "data" / setting.model / task) + CLEARLY
    )


def _majority(data: Path) -> float:
    """What answering the most frequent class scores on the test split, in percent."""
    if data.name == "cola":
        return 0.0  # Matthews
    labels = [json.loads(line)["label"] for line in (data / "test.jsonl").read_text().splitlines()]
    return 100 * max(map(labels.count, labels)) / len(labels)


def _claims(setting: Setting, table: Table, tasks: Sequence[str]) -> list[str]:
    """Each claim as a comparison of two systems over `tasks`, with the difference and its spread over seeds."""
    lines = ["| claim | difference | standard error | here |", "|---|---|---|---|"]
    for text, left, right, kind in CLAIMS:
        pairs = _pairs(tasks, table, left, right)
        if not pairs:
            continue
        text = f"{text} ({_size(table[left], tasks)} against {_size(table[right], tasks)} parameters)"
        differences = [difference for _, difference in pairs]
        several = len({seed for seed, _ in pairs}) > 1
        error = stdev(differences) / len(pairs) ** 0.5 if several else math.nan
        shown = f"{error:.1f}" if several else "–"
        verdict = _untested(left, table, tasks) or _verdict(
            kind, mean(differences), T_975[len(pairs) - 1] * error if several else math.nan
        )
        lines += [f"| {text} | {mean(differences):+.1f} | {shown} | {verdict} |"]
    names = [METRIC[task].partition(",")[0] for task in setting.tasks if task not in tasks]
    if names:
        lines += [
            "",
            f"After so few steps LoRA is not {CLEARLY:g} points above the majority class on {' and '.join(names)}, so "
            "no claim uses them.",
        ]
    note = (
        "Pairs are runs of the same task and seed, taken as independent. A claim of *more* holds if the difference's "
        "95 % t-interval is above zero, and fails if it is below. A claim of *as good* holds if the interval is above "
        f"-{MARGIN:g}, and fails if it is below zero. Everything between is undecided."
    )
    return [*lines, "", note, ""]


def _size(cell: Cell, tasks: Sequence[str]) -> str:
    """Mean number of trained parameters over the runs on `tasks`, for people."""
    return f"{round(_count(cell, tasks)):,}"


def _count(cell: Cell, tasks: Sequence[str]) -> float:
    """Mean number of trained parameters over the runs on `tasks`."""
    return mean(result.parameters for task in tasks for result in cell.get(task, {}).values())


def _untested(system: str, table: Table, tasks: Sequence[str]) -> str | None:
    """Why the comparison is none of the paper's: the masks keep another share than its own. None: they keep it.

    Half as much and twice as much count as its own: other models have other ratios.
    """
    if system not in PUBLISHED:
        return None
    whole, least, most = PUBLISHED[system]
    share = _count(table[system], tasks) / _count(table[whole], tasks)
    if least / 2 <= share <= 2 * most:
        return None
    return f"not tested: {share:.0%} of the values, the paper {least:.0%} to {most:.0%}"


def _pairs(tasks: Sequence[str], table: Table, left: str, right: str) -> list[tuple[int, float]]:
    """(seed, difference) of runs with the same task and seed."""
    if left not in table or right not in table:
        return []
    return [
        (seed, result.metric - table[right][task][seed].metric)
        for task in tasks
        for seed, result in table[left].get(task, {}).items()
        if seed in table[right].get(task, {})
    ]


def _verdict(kind: str, difference: float, half: float) -> str:
    """By half of the difference's interval."""
    if math.isnan(half):
        return "one seed: says nothing"
    if difference < -half:
        return "fails"
    least = -MARGIN if kind == SAME else 0.0
    return "holds" if difference - half > least else "undecided"
