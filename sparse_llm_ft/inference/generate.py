"""Predictions of a trained model for given texts, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparse_llm_ft.data.dataset import EvalSplit, SplitBuilder
from sparse_llm_ft.data.rows import Example, text_of
from sparse_llm_ft.data.tasks import BadRow, Task, render, template_columns
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.evaluation.evaluator import as_score
from sparse_llm_ft.inference.trained_run import TrainedRun, load_trained

Row = Mapping[str, str]


def answer(run: TrainedRun, rows: Sequence[Row]) -> list[str]:
    """Predict each row in this process: a completion, a label word, or a score.

    Args:
        run: opened `in_one_process` with the settings and the seed of generation.
        rows: texts by column, see `input_columns`.

    Raises:
        UserError: a text is empty.
    """
    context = run.context
    examples = [unlabeled_example(run.task, row, f"text {i}") for i, row in enumerate(rows, 1)]
    builder = SplitBuilder(
        context.config, context.task, context.tokenizer, context.task_mode, embeddings=context.embeddings
    )
    samples = list(builder.samples_of(examples))
    model = load_trained(run)
    evaluator = context.evaluator(())
    predictions, _ = evaluator.predict(model, EvalSplit("", examples, samples))
    values = [evaluator.readable(prediction) for prediction in predictions]
    if run.task.score is not None:  # a model that writes has written it
        values = [as_score(value, run.task.score) if isinstance(value, str) else value for value in values]
    return [value if isinstance(value, str) else f"{value:.3f}" for value in values]


def input_columns(run: TrainedRun) -> list[str]:
    """The columns that the model takes as input, in order."""
    if run.task_mode.has_head:
        return list(run.task.texts)
    return [run.task.messages] if run.task.messages is not None else template_columns(run.task.prompt or "")


def make_rows(columns: Sequence[str], texts: Sequence[str], given: Row) -> list[Row]:
    """One row per text: the text fills the only column that is not `given`. Without texts, the given row.

    Raises:
        UserError: the task does not have a given column, or a column has no text.
    """
    for name in given:
        if name not in columns:
            raise UserError(f"--column {name}: the task's input columns are {', '.join(columns)}")
    missing = [name for name in columns if name not in given]
    if not texts and not missing:
        return [given]
    if not texts or len(missing) != 1:
        wanted = " ".join(f"--column {name}=TEXT" for name in missing) if len(missing) > 1 else "a text"
        raise UserError(
            f"expected {wanted}: the task's input columns are {', '.join(columns)}"
            if missing
            else f"{texts[0]!r:.60}: --column gives every column, so no text is expected"
        )
    return [{**given, missing[0]: text} for text in texts]


def unlabeled_example(task: Task, row: Row, source: str) -> Example:
    """The row as an example without target: an empty completion, or the first label or lowest score as a placeholder.

    As in training, a column of the prompt may be empty while another one is not.

    Raises:
        UserError: a text is not text; one that a head sees, or the whole input, is empty.
    """
    try:
        empty = [column for column in row if not text_of(row, column).strip()]
    except BadRow as error:
        raise UserError(f"{source}: {error}") from None
    if empty and (len(empty) == len(row) or any(column in task.texts for column in empty)):
        raise UserError(f"{source}: column {', '.join(empty)} is empty")

    # Placeholders for the target, which samples must have.
    label: int | float | None = None
    completion = ""
    if task.labels is not None:
        label = 0
        completion = render(task.completion or f"{{{task.label_column}}}", {task.label_column: task.labels[0]})
    elif task.score is not None:
        label = task.score[0]

    # The inputs: a chat's turn, or prompt and texts.
    if task.messages is not None:
        turn = {"role": "user", "content": row[task.messages]}
        return Example(turn["content"], completion, (), source, messages=(turn,))
    texts = tuple(row.get(column, "") for column in task.texts)
    needed = template_columns(task.prompt or "")
    # A head sees only the texts, so its row may lack columns of the prompt.
    prompt = render(task.prompt, row) if task.prompt and all(name in row for name in needed) else "\n".join(texts)
    answers = () if task.extractive else None
    return Example(prompt, completion, (), source, label=label, texts=texts, answers=answers)
