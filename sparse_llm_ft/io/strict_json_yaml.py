"""Strict readers for untrusted JSON and YAML: they return plain values or raise one error, and never run code."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

MAX_YAML_BYTES = 2**20
MAX_JSON_BYTES = 2**26
"""The largest plan, with all masks of a large model, takes a quarter of it."""

_SPACE = re.compile(r"[ \t\n\r]*")
_MAX_NODES = 100_000
"""Largest size of a YAML document with its aliases expanded."""


class ParseError(ValueError):
    """Why a text cannot be parsed; `line` counts from 1 and is None where unknown."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def read_json(path: Path, constants: bool = False) -> Any:
    """The value in a JSON file; see `parse_json`.

    Raises:
        OSError: it cannot be read.
        ParseError: it is too large, not UTF-8, or not such JSON.
    """
    return parse_json(_read(path, MAX_JSON_BYTES), constants)


def read_yaml(path: Path) -> Any:
    """The value in a YAML file; see `parse_yaml`. Raises as `read_json`."""
    return parse_yaml(_read(path, MAX_YAML_BYTES))


def parse_json(text: str, constants: bool = False) -> Any:
    """One JSON value.

    Args:
        constants: whether to accept NaN and infinities, which JSON lacks and Python writes.

    Raises:
        ParseError: invalid JSON, a duplicate key, too deep nesting, or a number out of range.
    """
    try:
        if constants:
            return json.loads(text, object_pairs_hook=_unique)
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ParseError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ParseError(f"{error.msg} at column {error.colno}", error.lineno) from None
    except ValueError as error:  # Python reads no integer of more than some thousand digits
        raise ParseError(str(error)) from None


def parse_json_rows(text: str, key: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for each item of a JSON list, or of the list under `key` in a JSON object. Accepts NaN.

    Args:
        text: the whole document; items are parsed lazily.

    Raises:
        ParseError: as `parse_json`, with the line; also without such a list, or with text after the document.
    """
    scan = _Scan(text)
    if scan.peek() == "{":
        yield from scan.member(key)
    else:
        yield from scan.items()
    if scan.peek():
        scan.refuse("something stands behind the end of the document")


class _Scan:
    """A cursor that reads a JSON document value by value.

    It knows each item's line, which an error about a row must name. json, jiter and ijson do not report lines.
    """

    def __init__(self, text: str) -> None:
        self._text, self._place = text, 0
        self._line, self._counted = 1, 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique)

    def peek(self) -> str:
        """Skip spaces and return the next character; empty at the end."""
        match = _SPACE.match(self._text, self._place)
        self._place = match.end() if match else self._place
        return self._text[self._place : self._place + 1]

    def take(self, character: str) -> bool:
        """Skip `character` if it is next, and return whether it was."""
        if self.peek() != character:
            return False
        self._place += 1
        return True

    def items(self) -> Iterator[tuple[int, Any]]:
        """Yield (line, value) for each item of the list at the cursor."""
        if not self.take("["):
            self.refuse("a list of objects is needed")
        if self.take("]"):
            return
        while True:
            self.peek()
            line = self.line()
            yield line, self.value()
            if self.take("]"):
                return
            if not self.take(","):
                self.refuse("',' or ']' is needed")

    def member(self, key: str) -> Iterator[tuple[int, Any]]:
        """Yield (line, value) for each item of the list under `key` in the object at the cursor."""
        seen: set[str] = set()
        self.take("{")
        while self.peek() == '"':
            name = self.value()
            if name in seen:
                self.refuse(f"the key {name!r:.60} stands twice")
            seen.add(name)
            if not self.take(":"):
                self.refuse("':' is needed")
            self.peek()
            if name == key:
                yield from self.items()
            else:
                self.value()
            if not self.take(","):
                break
        if not self.take("}"):
            self.refuse("',' or '}' is needed")
        if key not in seen:
            self.refuse(f"a list of objects is needed, or an object with one under {key!r} (JSON lines are for .jsonl)")

    def value(self) -> Any:
        """Read the value at the cursor."""
        try:
            value, self._place = self._decoder.raw_decode(self._text, self._place)
        except RecursionError:
            self.refuse("nested too deeply")
        except json.JSONDecodeError as error:
            raise ParseError(f"{error.msg} at column {error.colno}", error.lineno) from None
        except ValueError as error:  # a duplicate key, or an integer longer than Python reads
            self.refuse(str(error))
        return value

    def line(self) -> int:
        """Line of the cursor, from 1."""
        self._line += self._text.count("\n", self._counted, self._place)
        self._counted = self._place
        return self._line

    def refuse(self, problem: str) -> NoReturn:
        """Raise a `ParseError` with the cursor's line."""
        raise ParseError(problem, self.line())


def parse_yaml(text: str) -> Any:
    """Parse one YAML value of mappings with string keys, lists, strings, numbers, true, false and null.

    Dates stay strings. Tags, which other types need, are refused.

    Raises:
        ParseError: invalid YAML, a duplicate key, a key that is no string, an alias inside its own anchor, aliases
            that expand to a very large document, too deep nesting, or a number out of range.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ParseError("nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ParseError(problem, mark.line + 1 if mark else None) from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        # PyYAML's constructors raise these for a value that does not fit its tag.
        raise ParseError(f"a value that does not fit its type ({error})") from None


def _read(path: Path, limit: int) -> str:
    if path.exists() and not path.is_file():
        raise ParseError("not a plain file")  # reading a pipe would wait for ever
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise ParseError(f"larger than {limit:,} bytes")
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParseError(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ParseError(f"the key {twice!r:.60} stands twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ParseError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ParseError(f"{text:.40} is out of range")
    return value


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys and large aliases."""

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document, then check the size of its expanded aliases."""
        node = super().get_single_node()
        if node is not None:
            _count_nodes(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping and refuse duplicate keys, of which SafeLoader would keep the last."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key is no text", key)
            if key.tag not in _KEYS:
                _refuse(f"the key {key.value:.60} is no text; quote it", key)
            if key.value in seen:
                _refuse(f"the key {key.value!r:.60} stands twice", key)
            seen.add(key.value)
        return node


def _count_nodes(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Number of nodes with all aliases expanded; `known` holds None for nodes being counted."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            _refuse("an alias of what it stands in", node)
        return size
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    size = 1
    for child in children:
        size += _count_nodes(child, known)
        if size > _MAX_NODES:
            _refuse(f"aliases make it larger than {_MAX_NODES:,} values", node)
    known[id(node)] = size
    return size


def _refuse(problem: str, node: yaml.Node) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_TAG = "tag:yaml.org,2002:"
_KEYS = {f"{_TAG}{kind}" for kind in ("str", "merge", "value", "timestamp")}
_CONSTRUCTORS: dict[Any, Any] = {
    f"{_TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"]
    for kind in ("null", "bool", "int", "float", "str", "seq", "map")
} | {
    f"{_TAG}timestamp": yaml.SafeLoader.yaml_constructors[f"{_TAG}str"],
    None: yaml.SafeLoader.yaml_constructors[None],
}
_Loader.yaml_constructors = _CONSTRUCTORS
