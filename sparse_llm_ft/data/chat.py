"""A run's chat template: its arguments, its date, the token that ends its turns, and what it opens before an answer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.errors import ConfigError

Turns = Sequence[Mapping[str, str]]

_CLOCK = "strftime_now"
"""transformers' function in a template that formats the present time."""

_USER, _ANSWER = "the user asks 7 things", "the assistant says 9 words"
_OPENED = re.compile(r"<(\|?)(think|thinking|thought|reasoning|seed:think)\1>|\[THINK\]")
_CLOSED = re.compile(r"</(\|?)(think|thinking|thought|reasoning|seed:think)\1>|<\|/\w+\|>|\[/THINK\]")


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer's chat template writes prompts; without a template, only `end_token_id` is used.

    Attributes:
        arguments: ``task.chat_template_kwargs``, given to the template.
        date: what the template takes for the present; None is the present.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> ChatFormat:
        """The format that a run's settings give to its tokenizer."""
        date = None if task.date is None else datetime.fromisoformat(task.date)
        return cls(tokenizer, task.chat_template_kwargs, date)

    def prompt_ids(self, turns: Turns) -> list[int]:
        """Token ids of the turns and of what the template writes before an answer. Raises what the template raises."""
        return list(self._apply(turns, add_generation_prompt=True, tokenize=True))

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template takes from outside; none without a template."""
        from jinja2 import meta

        return frozenset() if self._parsed is None else frozenset(meta.find_undeclared_variables(self._parsed))

    @cached_property
    def uses_date(self) -> bool:
        """Whether the template asks for the present time."""
        from jinja2 import nodes

        return self._parsed is not None and any(name.name == _CLOCK for name in self._parsed.find_all(nodes.Name))

    @cached_property
    def _parsed(self) -> Any:
        """The template as a tree; None without a template, or if it is none that can be used."""
        from jinja2 import TemplateError

        try:
            template = self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
            return template and _compile_jinja_template(template).environment.parse(template)
        except (TemplateError, ValueError):
            return None

    @cached_property
    def end_token_id(self) -> int:
        """The token that ends a completion: the one that ends the assistant's turns in the template, or else the
        tokenizer's end-of-sequence token.
        """
        usual = self.tokenizer.eos_token_id
        written = self._written(({"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}), False)
        _, answered, behind = written.rpartition(_ANSWER)
        known = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        ends = [token for token in known if token.strip() and behind.lstrip().startswith(token)]
        if not answered or not ends:
            return usual  # type: ignore[no-any-return]
        return int(self.tokenizer.convert_tokens_to_ids(max(ends, key=len)))  # type: ignore[arg-type]

    @cached_property
    def opened(self) -> str | None:
        """The tag of a block of thoughts that the template opens before an answer and leaves open, such as <think>."""
        written = self._written(({"role": "user", "content": _USER},), True).rpartition(_USER)[2]
        tags = list(_OPENED.finditer(written))
        return tags[-1][0] if tags and not _CLOSED.search(written, tags[-1].end()) else None

    def remarks(self) -> list[str]:
        """Log lines: the date, an end of turns that is not the end of sequences, and an opened block of thoughts."""
        lines = []
        if self.date is not None and self.uses_date:
            lines.append(f"the chat template asks for the date, and always gets {self.date.isoformat()} (task.date)")
        if self.end_token_id != self.tokenizer.eos_token_id:
            end = self.tokenizer.convert_ids_to_tokens(self.end_token_id)
            lines.append(
                f"completions end with {end}, which ends the turns of the chat template; give {self.end_token_id} as "
                "eos_token_id to transformers' generate, so that texts end there too"
            )
        if self.opened:
            switches = sorted(name for name in self.variables if re.search("think|reason", name))
            fix = (
                f"task.chat_template_kwargs.{switches[0]}=false"
                if switches
                else "task.chat_template, a file without it"
            )
            lines.append(
                f"warning: the chat template opens {self.opened} before each completion, and answers without thoughts "
                f"are learned inside of it; try {fix}, or begin completions with thoughts and the closing tag"
            )
        return lines

    def _written(self, turns: Turns, add_generation_prompt: bool) -> str:
        """The template's text of made-up turns; empty without a template, or if it rejects them."""
        if not self.tokenizer.chat_template:
            return ""
        try:
            return str(self._apply(turns, add_generation_prompt=add_generation_prompt, tokenize=False))
        except Exception:  # a template's code may raise anything
            return ""

    def _apply(self, turns: Turns, **options: Any) -> Any:
        messages: Any = [dict(turn) for turn in turns]
        with self._clock():
            return self.tokenizer.apply_chat_template(messages, return_dict=False, **options, **self.arguments)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Let the template see `date` as the present.

        transformers compiles a template once, with a clock of its own, and takes no functions as arguments.
        """
        if self.date is None or not self.uses_date:
            yield
            return
        compiled = _compile_jinja_template(self.tokenizer.get_chat_template())
        compiled.globals[_CLOCK] = self.date.strftime
        try:
            yield
        finally:
            del compiled.globals[_CLOCK]


def apply_chat_settings(tokenizer: PreTrainedTokenizerBase, task: TaskConfig, writes_chats: bool) -> ChatFormat:
    """Give the tokenizer the template of the settings, and check the template's arguments.

    Args:
        writes_chats: whether the model is a decoder without a head; others see plain texts.

    Raises:
        ConfigError: a setting is for other models, is no template, or names a variable that the template lacks.
    """
    settings = {
        "task.chat_template": task.chat_template,
        "task.chat_template_kwargs": task.chat_template_kwargs or None,
    }
    for setting, value in settings.items():
        if value is not None and not writes_chats:
            raise ConfigError(
                setting, "given, but this model sees plain texts", "expected none, or a decoder that writes"
            )
    if task.chat_template is not None:
        _check_syntax(task.chat_template)
        tokenizer.chat_template = task.chat_template
    chat = ChatFormat.of(tokenizer, task)
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", _CLOCK}
    for name in task.chat_template_kwargs:
        if not tokenizer.chat_template:
            raise ConfigError(
                "task.chat_template_kwargs", f"{name!r}, but the tokenizer has no chat template", "expected none"
            )
        if name not in chat.variables - reserved:
            known = sorted(chat.variables - reserved - {*tokenizer.special_tokens_map})
            raise ConfigError(
                "task.chat_template_kwargs",
                f"{name!r} is no argument of the chat template",
                f"known there: {', '.join(known) or 'none'}",
            )
    return chat


def with_date(task: TaskConfig, chat: ChatFormat, stored: str | None, agree: Callable[[str], str]) -> TaskConfig:
    """Collective, as `agree` is. The settings with the date that the template sees, if it asks for one.

    Args:
        stored: the date that the run began with, if it is resumed.
        agree: returns rank 0's text.
    """
    if task.date is not None or not chat.uses_date:
        return task
    return task.model_copy(update={"date": agree(stored or datetime.now().isoformat(timespec="seconds"))})


def _check_syntax(template: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise ConfigError(
            "task.chat_template", f"line {error.lineno} is no Jinja ({error.message})", "expected a chat template"
        ) from None
