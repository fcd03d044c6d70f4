"""Users' YAML files: configs, presets and storyboards. All are read here, and nowhere else.

Values are read as their authors mean them: of the plain words only `true`, `false` and `null` are more than
text, and only decimal numbers are numbers (YAML 1.2), so `off`, `no`, `12:30` and `2024-05-01` stay text;
where text is expected, a number is kept as written, too (`title: 2001`, `id: 007`). Anything ambiguous is
refused with its line: duplicate keys, tags, several documents. Depth and size are bounded, aliases included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from runtime.errors import BadRequestError, reason
from runtime.files.kinds import check_kind
from runtime.files.problems import explain_one
from runtime.files.text import line_of, no_text, read_text

NOTHING: Mapping[str, Any] = MappingProxyType({})
_Model = TypeVar("_Model", bound=BaseModel)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C is ten times faster, and otherwise equal

_DEEPEST = 50
_MOST_VALUES = 500_000  # with aliases expanded
_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")  # not 021, which some parsers read as octal
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, float | bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True, slots=True)
class Node:
    """A value in a YAML file, and its line.

    Attributes:
        value: text; a list of nodes; or key → line and node, in order.
        line: line number, counted from 1.
        plain: whether it is unquoted text, which may be a number or a word such as `true`.
        size, height: number of values in it, and depth of their nesting.
    """

    value: str | list[Node] | dict[str, tuple[int, Node]]
    line: int
    plain: bool = False
    size: int = 1
    height: int = 1

    @property
    def content(self) -> Any:
        """Value in Python's types."""
        if isinstance(self.value, dict):
            return {name: node.content for name, (_, node) in self.value.items()}
        if isinstance(self.value, list):
            return [node.content for node in self.value]
        if not self.plain:
            return self.value
        if self.value in _WORDS:
            return _WORDS[self.value]
        if _INT.fullmatch(self.value):
            return int(self.value)
        return float(self.value) if len(self.value) < 100 and _FLOAT.fullmatch(self.value) else self.value


@dataclass(frozen=True, slots=True)
class YamlFile:
    """A parsed YAML file.

    Attributes:
        path: path as the user gave it.
        field: field that names the file.
        root: its content.
    """

    path: Path
    field: str
    root: Node

    @classmethod
    def read(cls, path: Path, field: str) -> YamlFile:
        """Read and parse a file.

        Raises:
            BadRequestError: it cannot be read, or is not valid YAML; the message names the line.
        """
        text = read_text(path, field)
        try:
            return cls(path, field, _compose(text))
        except _WrongError as error:
            said = f"{field}: {str(path)!r}, line {error.line}: it is not valid YAML: {error}"
            raise BadRequestError(said) from None

    @property
    def folder(self) -> Path:
        """Folder of the file, to which paths in it are relative."""
        return self.path.absolute().parent

    def parse(self, model: type[_Model], usual: Mapping[str, Any] = NOTHING) -> _Model:
        """Parse the content as a pydantic model.

        Args:
            model: the model.
            usual: values of fields that the content lacks; `defaults` is completed field by field.

        Raises:
            BadRequestError: one line per bad field, with its line in the file; or it is of another kind.
        """
        try:
            return self.validate(model, usual)
        except ValidationError as error:
            check_kind(self.root.content, self.field, self.path)
            said = [
                f"{self.field} {self.path}, line {self.line(problem['loc'])}: "
                f"{explain_one(problem, problem['loc'], model)}"
                for problem in error.errors(include_url=False)
            ]
            raise BadRequestError("\n".join(said)) from None

    def validate(self, model: type[_Model], usual: Mapping[str, Any] = NOTHING) -> _Model:
        """Parse the content as `parse` does, but raise pydantic's own error."""
        content = _completed(self.root.content, usual)
        try:
            return model.model_validate(content)
        except ValidationError as error:
            if not self._as_text(content, error):
                raise
        return model.model_validate(content)

    def _as_text(self, content: Any, error: ValidationError) -> bool:
        """Replace numbers and booleans by their text where text is expected; return whether there was one."""
        changed = False
        for problem in error.errors(include_url=False):
            way = [part for part, _, _ in self._steps(problem["loc"])]
            if problem["type"] != "string_type" or problem["input"] is None or not way:
                continue
            *_, (_, _, node) = self._steps(problem["loc"])
            if not isinstance(node.value, str):
                continue
            holder = content
            for part in way[:-1]:
                holder = holder[part]
            holder[way[-1]] = node.value
            changed = True
        return changed

    def line(self, way: Sequence[int | str]) -> int:
        """Line of a field, given by its path; of its deepest parent in the file if it is missing."""
        line = self.root.line
        for _, line, _ in self._steps(way):  # noqa: B007
            pass
        return line

    def has(self, way: Sequence[int | str]) -> bool:
        """Return whether the file has a value at the path `way`."""
        return len(list(self._steps(way))) == len(way)

    def _steps(self, way: Sequence[int | str]) -> Iterator[tuple[int | str, int, Node]]:
        """Yield the parts of a path that the file has, with line and node; tags of unions are left out."""
        node = self.root
        for part in way:
            if isinstance(node.value, dict) and str(part) in node.value:
                line, node = node.value[str(part)]
                yield str(part), line, node
            elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                yield part, node.line, node


def _completed(content: Any, usual: Mapping[str, Any]) -> Any:
    """Add usual values to the content of a file, unless it is no mapping and will be refused."""
    if not isinstance(content, dict):
        return content
    whole = {**usual, **content}
    own, others = content.get("defaults"), usual.get("defaults")
    if isinstance(own, dict) and others is not None:
        whole["defaults"] = {**others, **own}
    return whole


class _WrongError(Exception):
    """A line is not acceptable."""

    def __init__(self, line: int, reason: str):
        self.line = line
        super().__init__(reason)


def _compose(text: str) -> Node:
    """Parse a text into nodes.

    Raises:
        _WrongError: it is not YAML, or not the subset that is accepted here.
    """
    found = no_text(text)
    if found is not None:
        raise _WrongError(line_of(text, found[0]), f"it has {found[1]}")
    try:
        composer = _Composer()
        for event in yaml.parse(text, Loader=_LOADER):
            composer.take(event)
        root = composer.root
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line + 1, text.count("\n") + 1) if mark else 1
        raise _WrongError(line, _reason(error)) from None
    except yaml.YAMLError as error:
        raise _WrongError(1, reason(error)) from None
    if root is None or (root.plain and root.content is None):
        raise _WrongError(1, "it is empty")
    return root


def _reason(error: yaml.MarkedYAMLError) -> str:
    said = ", ".join(part for part in (error.context, error.problem) if part) or "it cannot be parsed"
    if "mapping values are not allowed" in said:
        said += '; text with ": " in it needs quotes'
    return said


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end was not yet reached."""

    line: int
    anchor: str | None
    mapping: bool
    items: list[Node]


class _Composer:
    """Makes the nodes of one document from the parser's events, without recursion: depth is checked first."""

    def __init__(self) -> None:
        self.root: Node | None = None
        self._stack: list[_Open] = []
        self._anchors: dict[str, Node] = {}

    def take(self, event: yaml.Event) -> None:
        """Take the next event."""
        line = event.start_mark.line + 1 if event.start_mark else 1
        match event:
            case yaml.DocumentStartEvent() if self.root is not None:
                raise _WrongError(line, "a second document begins here (---); only one is allowed")
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                mapping = isinstance(event, yaml.MappingStartEvent)
                _check_tag(event.tag, line, "map" if mapping else "seq")
                self._stack.append(_Open(line, event.anchor, mapping, []))
                _check_depth(len(self._stack), line)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                done = self._stack.pop()
                self._place(_closed(done), done.anchor)
            case yaml.ScalarEvent():
                _check_tag(event.tag, line, "str")
                plain = event.implicit[0] and event.style in (None, "")
                self._place(Node(event.value, line, plain=plain), event.anchor)
            case yaml.AliasEvent():
                if event.anchor not in self._anchors:
                    raise _WrongError(line, f"*{event.anchor} refers to no anchor that ended before it")
                self._place(self._anchors[event.anchor], None)

    def _place(self, node: Node, anchor: str | None) -> None:
        """Add a complete node to its parent."""
        _check_depth(len(self._stack) + node.height, node.line)
        if anchor is not None:
            self._anchors[anchor] = node
        if self._stack:
            self._stack[-1].items.append(node)
        else:
            self.root = node


def _check_depth(depth: int, line: int) -> None:
    if depth > _DEEPEST:
        raise _WrongError(line, f"it is nested more than {_DEEPEST} levels deep")


def _check_tag(tag: str | None, line: int, known: str) -> None:
    if tag not in (None, "!", _TAG + known):
        assert tag is not None
        said = tag.replace(_TAG, "!!")[:60]
        raise _WrongError(line, f"it has the tag {said}; leave it out")


def _closed(done: _Open) -> Node:
    """Make the node of a list or mapping that has ended."""
    size = 1 + sum(node.size for node in done.items)
    height = 1 + max((node.height for node in done.items), default=0)
    if size > _MOST_VALUES:
        raise _WrongError(done.line, f"it has more than {_MOST_VALUES} values")
    if not done.mapping:
        return Node(done.items, done.line, size=size, height=height)
    values: dict[str, tuple[int, Node]] = {}
    merged: list[Node] = []
    for key, node in zip(done.items[::2], done.items[1::2], strict=True):
        if not isinstance(key.value, str):
            raise _WrongError(key.line, "a key must be a word")
        if key.plain and key.value == "<<":
            merged += node.value if isinstance(node.value, list) else [node]
            continue
        if key.value in values:
            first = values[key.value][0]
            raise _WrongError(key.line, f"{key.value[:60]} is given twice, first in line {first}")
        values[key.value] = key.line, node
    for node in merged:
        if not isinstance(node.value, dict):
            raise _WrongError(node.line, "<< needs a mapping")
        values = {**node.value, **values}
    return Node(values, done.line, size=size, height=height)
