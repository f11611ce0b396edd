"""Texts in, the trained model's answers out, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparse_llm_ft.data.dataset import EvalSplit, SplitBuilder
from sparse_llm_ft.data.rows import Example, text_of
from sparse_llm_ft.data.tasks import BadRow, Task, render, template_columns
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.inference.trained_run import TrainedRun, load_trained

Row = Mapping[str, str]


def answer(run: TrainedRun, rows: Sequence[Row]) -> list[str]:
    """Predict each row in this process: a completion, a label word, or a score.

    Args:
        run: opened with the evaluation settings and the seed that generation takes, `in_one_process`.
        rows: the columns of `shown_columns`.

    Raises:
        UserError: a prompt is empty, or the task's answers exist in evaluation only.
    """
    context = run.context
    examples = [unanswered(run.task, row, f"text {i}") for i, row in enumerate(rows, 1)]
    builder = SplitBuilder(context.config, context.task, context.tokenizer, context.task_mode)
    samples = list(builder.samples_of(examples))
    model = load_trained(run)
    evaluator = context.evaluator(())
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
