"""Pages name the environment variables, exit codes and messages that are in the code, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from launch.shell import exits
from tests.places import ROOT

PAGE = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
FOLDERS = ("launch", "runtime", "spectrum")
CODE = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/**/*.py"))]
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")
READERS = {"_number", "_is"}  # functions of the code that read the variable that their first argument names


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading of the page, without its first two lines."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(heading)]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line.strip("|").split("|") for line in lines[2:]]


def is_environment(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def names_in(tree: ast.Module) -> Iterator[ast.expr]:
    """Expressions by which a module reads or sets variables of the environment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environment(node.value):
            yield node.slice
        elif isinstance(node, ast.Compare) and any(is_environment(one) for one in node.comparators):
            yield node.left
        elif isinstance(node, ast.Call):
            called = node.func
            of_environment = isinstance(called, ast.Attribute) and is_environment(called.value)
            reader = isinstance(called, ast.Name) and called.id in READERS
            if (of_environment or reader) and node.args:
                yield node.args[0]


def constants(tree: ast.Module) -> dict[str, str]:
    """Texts of a module that have a name."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }


def variables() -> set[str]:
    """Variables that the code reads or sets."""
    found = set()
    for path in CODE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known = constants(tree)
        for name in names_in(tree):
            text = name.value if isinstance(name, ast.Constant) else known.get(getattr(name, "id", ""))
            if isinstance(text, str) and VARIABLE.fullmatch(text):
                found.add(text)
    return found


def test_the_variables_of_the_page_are_those_of_the_code() -> None:
    named = {name for cells in rows("Environment variables") for name in re.findall(r"`(\w+)`", cells[0])}
    assert named == variables()


def test_the_exit_codes_of_the_page_are_those_of_the_code() -> None:
    codes = {int(cells[0]) for cells in rows("Exit codes")}
    assert codes == {0, exits.EXIT_BAD_REQUEST, exits.EXIT_FAILED, exits.EXIT_CANCELLED}


OTHERS = {  # messages that are not Lockstep's
    "lockstep: command not found",
    "torch.OutOfMemoryError",
    "No space left on device",
    "ModuleNotFoundError",
    "Connection refused",
    "NCCL error: unhandled system error",
    "Python 3.11 or 3.12 is needed",  # the Makefile's
}


def texts() -> str:
    """Every text in the code, with … for each value that is put into it."""
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| message \|.*?(?=^$|\Z)", page, re.MULTILINE | re.DOTALL)
    cells = [line.split("|")[1] for table in tables for line in table.splitlines()[2:]]
    messages = {message for cell in cells for message in re.findall(r"`([^`]+)`", cell)} - OTHERS
    known = texts()
    pieces = {piece.strip(" :,()") for message in messages for piece in message.split("…")}
    assert len(messages) > 20
    assert [piece for piece in sorted(pieces) if piece not in known] == []
