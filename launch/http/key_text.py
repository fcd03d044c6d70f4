"""Changes to the text of a file of keys, which leave what people wrote beside the keys as it is."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

_LIST = "keys"


def with_key(text: str, key: dict[str, Any]) -> str | None:
    """Add a key at the end of the list; None if the text has a form that only people write."""
    found, added = _keys(text), yaml.safe_dump([key], sort_keys=False, allow_unicode=True)
    if found is None or (found.flow_style and found.value):
        return None
    start, end = found.start_mark.index, _end(found)
    after = _next_line(text, end)
    before = text[:start].rstrip() + text[end:after] if found.flow_style else text[:after]
    if not before.endswith("\n"):
        before += "\n"
    indent = 0 if found.flow_style else found.start_mark.column
    return before + textwrap.indent(added, " " * indent) + text[after:]


def without_key(text: str, number: int) -> str | None:
    """Remove a key by its place in the list, from 0; None as of `with_key`."""
    found = _keys(text)
    if found is None or found.flow_style:
        return None
    start, after = found.value[number].start_mark.index, _next_line(text, _end(found.value[number]))
    line = text.rfind("\n", 0, start) + 1
    if text[line:start].strip() != "-":
        return None
    return text[:line] + ("" if len(found.value) > 1 else "  []\n") + text[after:]


def _keys(text: str) -> yaml.SequenceNode | None:
    """The list of keys, with its places in the text."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    if not isinstance(root, yaml.MappingNode):
        return None
    lists = [value for name, value in root.value if name.value == _LIST]
    return next((found for found in lists if isinstance(found, yaml.SequenceNode)), None)


def _end(node: Any) -> int:
    """Index behind a value. The parser's own end of a list comes after the comments that follow it."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(node, yaml.MappingNode) else last)


def _next_line(text: str, index: int) -> int:
    """Index at which the line after that of `index` begins, or the text ends."""
    return text.find("\n", index) + 1 or len(text)
