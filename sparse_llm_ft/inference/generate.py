"""Texts in, the trained model's answers out, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparse_llm_ft.config import EvaluationConfig
from sparse_llm_ft.data.dataset import EvalSplit, SplitBuilder
from sparse_llm_ft.data.rows import Example, text_of
from sparse_llm_ft.data.tasks import BadRow, Task, render, template_columns
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.evaluation.evaluator import Evaluator
from sparse_llm_ft.inference.trained_run import TrainedRun, load_trained
from sparse_llm_ft.model.limits import check_lengths, tokenizer_for
from sparse_llm_ft.objectives.build import build_objective

Row = Mapping[str, str]


def answer(run: TrainedRun, rows: Sequence[Row], settings: EvaluationConfig, seed: int) -> list[str]:
    """What the trained model makes of each row: a completion, a label word, or a score.

    Args:
        rows: the columns of `shown_columns`.
        seed: of sampling, where `settings.temperature` asks for it.

    Raises:
        UserError: a prompt that is empty, or an answer that cannot be given outside of evaluation.
    """
    examples = [unanswered(run.task, row, f"text {i}") for i, row in enumerate(rows, 1)]
    check_lengths(run.config.model_copy(update={"evaluation": settings}), run.task, run.task_mode, run.empty)
    tokenizer = tokenizer_for(run.config.model, run.task_mode, run.empty)
    samples = list(SplitBuilder(run.config, run.task, tokenizer, run.task_mode).samples_of(examples))
    model = load_trained(run)
    objective, alone = build_objective(model, tokenizer, run.task), World(0, 1, 0, 1)
    evaluator = Evaluator(settings, run.task, run.task_mode, (), tokenizer, objective, alone, zero_stage=0, seed=seed)
    predictions, _ = evaluator.predict(model, EvalSplit("", examples, samples))
    shown = [evaluator.shown(prediction) for prediction in predictions]
    return [value if isinstance(value, str) else f"{value:.3f}" for value in shown]


def shown_columns(run: TrainedRun) -> list[str]:
    """The columns of a row that the model sees, in order."""
    if run.task_mode.has_head:
        return list(run.task.texts)
    return [run.task.messages] if run.task.messages is not None else template_columns(run.task.prompt or "")


def make_rows(columns: Sequence[str], texts: Sequence[str], given: Row) -> list[Row]:
    """A row for each of `texts`, which fills the one column that is not `given`; without texts the row given.

    Raises:
        UserError: a column that the task has not, or columns without a text.
    """
    for name in given:
        if name not in columns:
            raise UserError(f"--column {name}: the task shows the model {', '.join(columns)}")
    missing = [name for name in columns if name not in given]
    if not texts and not missing:
        return [given]
    if not texts or len(missing) != 1:
        wanted = " ".join(f"--column {name}=TEXT" for name in missing) if len(missing) > 1 else "a text"
        raise UserError(
            f"expected {wanted}: the task shows the model {', '.join(columns)}"
            if missing
            else f"{texts[0]!r:.60}: every column is given by --column, and no text is left to fill"
        )
    return [{**given, missing[0]: text} for text in texts]


def unanswered(task: Task, row: Row, source: str) -> Example:
    """The row as an example whose answer is unknown: the completion is empty; a label or a score, which samples
    cannot be without, is the task's first or lowest, and says nothing.

    Raises:
        UserError: a text is empty, or none.
    """
    for column in row:
        try:
            empty = not text_of(row, column).strip()
        except BadRow as error:
            raise UserError(f"{source}: {error}") from None
        if empty:
            raise UserError(f"{source}: column {column} is empty")
    label: int | float | None = None
    completion = ""
    if task.labels is not None:
        label = 0
        completion = render(task.completion or f"{{{task.label_column}}}", {task.label_column: task.labels[0]})
    elif task.score is not None:
        label = task.score[0]
    if task.messages is not None:
        turn = {"role": "user", "content": row[task.messages]}
        return Example(turn["content"], completion, (), source, messages=(turn,))
    texts = tuple(row.get(column, "") for column in task.texts)
    needed = template_columns(task.prompt or "")
    # A model with a head sees the texts alone, and a row for it need not have what the prompt shows.
    prompt = render(task.prompt, row) if task.prompt and all(name in row for name in needed) else "\n".join(texts)
    answers = () if task.extractive else None
    return Example(prompt, completion, (), source, label=label, texts=texts, answers=answers)
