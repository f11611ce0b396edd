"""A run's tokenised splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.config import RunConfig, TaskConfig
from sparse_llm_ft.config.schema import LOSS
from sparse_llm_ft.data.cache import CachedDataset, cache_folder, samples_key, schema_of, tokenizer_key, write_cached
from sparse_llm_ft.data.chat import ChatFormat
from sparse_llm_ft.data.reading import Example, Skipped, examples, read_split, split_files
from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.data.source_key import ends_of, source_of
from sparse_llm_ft.data.spans import SpanPreprocessor, SpanSample
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.data.tasks import Task, render
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.data.tokenization import (
    CausalLMPreprocessor,
    ClassificationPreprocessor,
    Preprocessor,
    Seq2SeqPreprocessor,
    completion_ids,
)
from sparse_llm_ft.distributed.collectives import ALONE, Coordination
from sparse_llm_ft.errors import ConfigError, DataError, UserError


@dataclass(frozen=True)
class EvalSplit:
    """A split that is evaluated before and after training.

    Attributes:
        name: empty, or the name of a further split such as MNLI's ``mismatched``.
        examples: the rows.
        samples: the samples made from these rows.
        key: equal for equal samples.
    """

    name: str
    examples: Sequence[Example]
    samples: Sequence[Any]
    key: str = ""


@dataclass(frozen=True)
class Splits:
    """A run's tokenised splits; `validation` and `measured` may be empty.

    Attributes:
        watched: the first samples of the validation split, with their rows, for metrics during training; empty if the
            settings ask for none.
        key: equal for equal samples in all splits; only the two ends of a streamed file count.
    """

    train: CachedDataset | StreamingDataset
    validation: Sequence[Any]
    measured: tuple[EvalSplit, ...]
    key: str
    watched: tuple[EvalSplit, ...] = ()

    @classmethod
    def encode(
        cls,
        config: RunConfig,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        task_mode: TaskMode,
        ranks: Coordination = ALONE,
        embeddings: int | None = None,
    ) -> Splits:
        """Collective over `ranks`. Tokenise every split that a run needs, or find it in the cache.

        Args:
            embeddings: number of tokens that the model has embeddings for; None is not checked.

        Raises:
            UserError: a row or a sample cannot be used, or the task does not define this model's inputs.
        """
        encoding = SplitBuilder(config, task, tokenizer, task_mode, ranks, embeddings)
        train: CachedDataset | StreamingDataset
        if config.task.streaming:
            train, key = encoding.streamed(), encoding.stream_key()
        else:
            train = encoding.stored("train")
            key = train.key
        validation = encoding.stored("validation") if config.training.eval_every is not None else ()
        measured = encoding.measured()
        keys = samples_key(train=key, measured=[part.key for part in measured])
        watched = (encoding.measured_part("validation"),) if config.training.watched_metric not in (None, LOSS) else ()
        return cls(train, validation, measured, keys, watched)

    def sizes(self, measured: str) -> dict[str, int]:
        """Split -> number of samples; 0 for a streamed training split.

        Args:
            measured: name of the evaluated split.
        """
        train = 0 if isinstance(self.train, StreamingDataset) else len(self.train)
        return {"train": train} | {part.name or measured: len(part.examples) for part in self.measured}

    def remarks(self, task: TaskConfig) -> list[str]:
        """Log lines that say how many samples of each split were truncated or left out."""
        parts: list[tuple[str, Any]] = [] if isinstance(self.train, StreamingDataset) else [("training", self.train)]
        if isinstance(self.validation, CachedDataset):
            parts.append(("validation", self.validation))
        return _remarks(parts, task) + remarks_of(self.measured, task)


def remarks_of(measured: Sequence[EvalSplit], task: TaskConfig) -> list[str]:
    """Log lines that say how many evaluated samples were truncated or left out."""
    return _remarks([(f"measured {part.name}".strip(), part.samples) for part in measured], task)


def _remarks(parts: Sequence[tuple[str, Any]], task: TaskConfig) -> list[str]:
    most = f"max_length {task.max_length}"
    if task.max_prompt_length is not None:
        most = f"max_prompt_length {task.max_prompt_length}"
    lines = []
    for name, samples in parts:
        if samples.shortened:
            lines.append(f"{samples.shortened} of {len(samples)} {name} texts were shortened to fit task.{most}")
        if samples.skipped:
            lines.append(f"{samples.skipped} {name} rows were left out, the first: {samples.reasons[0]}")
    return lines


@dataclass(frozen=True)
class SplitBuilder:
    """Turns a run's splits into samples.

    Attributes:
        embeddings: number of tokens that the model has embeddings for; None is not checked.
    """

    config: RunConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase
    task_mode: TaskMode
    ranks: Coordination = ALONE
    embeddings: int | None = None

    def __post_init__(self) -> None:
        _check_inputs(self.task, self.task_mode, self.config.model.name)

    @cached_property  # a stream asks for it at each row, and the limit of prompts needs all labels' tokens
    def encoder(self) -> Preprocessor:
        """The preprocessor of the task mode: example -> sample, or windows."""
        length = self.config.task.max_length
        if self.task_mode.mode == "question_answering":
            return SpanPreprocessor(self.tokenizer, length)
        if self.task_mode.has_head:
            return ClassificationPreprocessor(self.tokenizer, length)
        if self.task_mode.mode == "seq2seq_lm":
            return Seq2SeqPreprocessor(self.tokenizer, length, self._prompt_length)
        return CausalLMPreprocessor(self.tokenizer, length, self._prompt_length, self.chat)

    @cached_property
    def chat(self) -> ChatFormat:
        """How prompts are written with the chat template, if there is one."""
        return ChatFormat.of(self.tokenizer, self.config.task)

    @property
    def _prompt_length(self) -> int | None:
        """Maximum prompt tokens of a generating model: the setting, reduced so that every label fits behind it."""
        settings, task = self.config.task, self.task
        answers = task.labels or [f"{score:.1f}" for score in task.score or ()]
        if self.task_mode.mode == "seq2seq_lm" or not answers:
            return settings.max_prompt_length
        assert task.completion, "resolve_task made sure"
        completions = [render(task.completion, {task.label_column: answer}) for answer in answers]
        room = settings.max_length - max(
            len(completion_ids(text, self.tokenizer, self.chat.end_token_id)) for text in completions
        )
        if room < 1:
            raise ConfigError(
                "task.max_length", f"{settings.max_length} leaves no room beside the longest label", "expected more"
            )
        return min(settings.max_prompt_length or room, room)

    @property
    def kind(self) -> type:
        """The samples' class."""
        if self.task_mode.mode == "question_answering":
            return SpanSample
        return TextSample if self.task_mode.has_head else Sample

    def stored(self, split: str, further: str | None = None, limit: int | None = None) -> CachedDataset:
        """Collective over `ranks`. A split's samples from the cache; missing ones are written first."""
        own, kind = "", self.kind

        def find() -> None:
            nonlocal own
            own = self.key(split, further, limit)

        self.ranks.on_leaders(find)  # one process per node reads a large file to its end
        key = self.ranks.broadcast(own)
        skipped = Skipped()

        def write() -> None:
            _check_same(own, key, split)
            counts = lambda: {"skipped": skipped.count, "reasons": skipped.reasons}  # noqa: E731
            make = lambda: self._encode(self._rows(split, further, skipped), skipped, limit)  # noqa: E731
            schema = schema_of(kind, self.task.score is not None)
            write_cached(key, kind, schema, make, counts)

        self.ranks.on_leaders(write)
        samples = self._on_every_rank(lambda: CachedDataset(cache_folder(key), kind))
        if not len(samples):
            raise UserError(f"task: no usable row in {split} ({'; '.join(samples.reasons) or 'it is empty'})")
        if self._limit is not None:
            count, token = samples.beyond(self._limit)
            if count:
                raise self._without_embedding(f"{count} of {len(samples)} {split} samples have", token)
        return samples

    @cached_property
    def _limit(self) -> int | None:
        """Number of embeddings, if the tokenizer has tokens beyond them."""
        if self.embeddings is None or max(self.tokenizer.get_vocab().values(), default=0) < self.embeddings:
            return None
        return self.embeddings

    def _without_embedding(self, who: str, token: int) -> ConfigError:
        return ConfigError(
            "model.name",
            f"{self.config.model.name!r} has embeddings for {self.embeddings} tokens, and {who} tokens beyond them, "
            f"such as {self.tokenizer.convert_ids_to_tokens(token)!r} (id {token})",
            "set model.resize_embeddings: true, and adapter.trainable_tokens to train their rows",
        )

    def _checked(self, sample: Any) -> Any:
        """The sample, which is one of a stream or was given by the user.

        Raises:
            ConfigError: it has a token without embedding.
        """
        for part in sample if isinstance(sample, list) else (sample,):
            ids = (*getattr(part, "prompt_ids", ()), *getattr(part, "completion_ids", ()), *getattr(part, "ids", ()))
            if self._limit is not None and max(ids) >= self._limit:
                raise self._without_embedding("a row has", max(ids))
        return sample

    def samples_of(self, rows: Iterable[Example]) -> Iterator[Any]:
        """Tokenise the given rows without the cache.

        Raises:
            DataError: a row does not fit. ``task.on_bad_row`` does not apply to rows that the caller names.
        """
        return map(self._checked, self._encode(rows, None))

    def streamed(self) -> StreamingDataset:
        """The training split, read row by row."""
        settings = self.config.task
        return StreamingDataset(
            lambda skipped: examples(self.task, "train", skipped),
            self._encode_checked,
            settings.shuffle_buffer,
            self.config.seed,
            settings.max_length,
        )

    def _encode_checked(self, example: Example) -> Any:
        return self._checked(self.encoder(example))

    def stream_key(self) -> str:
        """Collective over `ranks`. The streamed split's key, from a file's two ends: reading it all may take hours.

        Raises:
            UserError: on every rank, if files or tokenizer of one differ from those of rank 0.
        """

        def make() -> str:
            return samples_key(
                rows=[ends_of(path) for path in split_files(self.task, "train")],
                tokenizer=tokenizer_key(self.tokenizer),
                max_length=[self.config.task.max_length, self.config.task.max_prompt_length],
                chat=self._chat_key,
            )

        own: str = self._on_every_rank(make)
        key = self.ranks.broadcast(own)
        self.ranks.on_every_rank(lambda: _check_same(own, key, "train"))
        return key

    def measured(self) -> tuple[EvalSplit, ...]:
        """Collective over `ranks`. The first samples of the evaluated split and of the task's further splits."""
        evaluation = self.config.evaluation
        if not evaluation.samples:
            return ()
        return tuple(self.measured_part(evaluation.split, further) for further in (None, *self.task.further_splits))

    def measured_part(self, split: str, further: str | None = None) -> EvalSplit:
        """Collective over `ranks`. The first `evaluation.samples` of a split."""
        rows = self._on_every_rank(partial(self._measured_rows, split, further))
        samples = self.stored(split, further, self.config.evaluation.samples)
        return EvalSplit(further or "", rows, samples, samples.key)

    def _measured_rows(self, split: str, further: str | None) -> list[Example]:
        """The first `evaluation.samples` usable rows: `stored` makes its samples from the same ones."""
        rows = self._rows(split, further, Skipped())
        if self.task.on_bad_row == "skip":
            rows = (row for row in rows if self._fits(row))
        return list(islice(rows, self.config.evaluation.samples))

    def _rows(self, split: str, further: str | None, skipped: Skipped) -> Iterable[Example]:
        if split == "train" or self.task.group_by is None:
            return examples(self.task, split, skipped, further)
        return read_split(self.task, split, further, skipped=skipped)

    def _on_every_rank(self, make: Callable[[], Any]) -> Any:
        found = []
        self.ranks.on_every_rank(lambda: found.append(make()))
        return found[0]

    def _fits(self, example: Example) -> bool:
        try:
            self.encoder(example)
        except DataError:
            return False
        return True

    def _encode(self, rows: Iterable[Example], skipped: Skipped | None, limit: int | None = None) -> Iterator[Any]:
        encode, number = self.encoder, 0
        for example in rows:
            try:
                sample = encode(example)
            except DataError as error:
                if skipped is None or self.task.on_bad_row == "error":
                    raise
                skipped.add(error)
                continue
            if isinstance(sample, list):
                yield from (replace(window, example=number) for window in sample)
            else:
                yield sample
            number += 1
            if number == limit:
                return

    @property
    def _chat_key(self) -> list[Any]:
        """What samples depend on beside the tokenizer's chat template."""
        settings = self.config.task
        return [settings.chat_template_kwargs, settings.date if self.chat.uses_date else None]

    def key(self, split: str, further: str | None = None, limit: int | None = None) -> str:
        """The cache key, from the contents of rows and tokenizer and from every setting that samples depend on."""
        task, settings = self.task, self.config.task
        templates = {f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.name not in _NOT_CONTENT}
        return samples_key(
            rows=source_of(task, split, further),
            tokenizer=tokenizer_key(self.tokenizer),
            mode=self.task_mode.mode,
            max_length=[settings.max_length, settings.max_prompt_length],
            chat=self._chat_key,
            on_bad_row=settings.on_bad_row,
            split=[split, further, limit],
            task=templates,
        )


_NOT_CONTENT = (
    "flatten",
    "metrics",
    "source",
    "description",
    "example",
    "further_splits",
    "splits",
    "path",
    "on_bad_row",
    "streaming",
)


def _check_same(own: str, key: str, split: str) -> None:
    """Refuse a key that is not rank 0's."""
    if own != key:
        raise UserError(f"task: this node's {split} rows or tokenizer differ from those on rank 0's node")


def _check_inputs(task: Task, task_mode: TaskMode, model: str) -> None:
    if not task_mode.has_head and not (task.prompt or task.messages):
        raise ConfigError(
            "task.prompt", f"not given, and {model!r} generates text", "expected a template such as '{text}'"
        )
    if task_mode.has_head and not task.texts:
        raise ConfigError(
            "task.texts",
            f"not given, and task.prompt has more than two columns, too many for the head of {model!r}",
            "expected one column or two",
        )
