"""The file of API keys: who may use the server, and how much. It holds hashes, never the keys themselves.

A key has 256 random bits, so one SHA-256 protects it as well as any slow hash would.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from launch.http.key_text import with_key, without_key
from runtime.errors import BadRequestError
from runtime.files.atomic import whole_file
from runtime.files.checks import check_writable, refusing
from runtime.files.locks import alone_in
from runtime.files.problems import HIDDEN, explain
from runtime.files.text import read_text
from runtime.files.yaml import YamlFile
from runtime.request.bounds import NUMBER

PREFIX = "lockstep-"  # of every key, so that scanners for leaked secrets can find them
SECRET = "whsec_"  # likewise, of a webhook's secret
LOCAL = "local"  # owner of everything on a server without keys
MOST_PRIORITY = 1_000_000


def _one_line(text: str) -> str:
    if not (text.strip() and text.isprintable()):
        raise ValueError("must be one line of text")
    return text


_Name = Annotated[str, Field(max_length=200), AfterValidator(_one_line)]
_Count = Annotated[int, Field(ge=0, le=10**9), NUMBER]


def _digest(text: str) -> str:
    if re.fullmatch("[0-9a-f]{64}", text) is None:
        raise PydanticCustomError(HIDDEN, "must be 64 hexadecimal digits, which `lockstep keys add` writes")
    return text


def _secret(text: str) -> str:
    found = re.fullmatch(f"{SECRET}([A-Za-z0-9+/=]{{24,200}})", text)
    try:
        decoded = b"" if found is None else base64.b64decode(found[1], validate=True)
    except ValueError:
        decoded = b""
    if not decoded:
        raise PydanticCustomError(HIDDEN, f"must be {SECRET} and at least 24 characters of base64")
    return text


class Webhook(BaseModel):
    """URL to which an owner's events are sent, and the secret that signs them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2000)]
    secret: Annotated[str, AfterValidator(_secret)]


class Key(BaseModel):
    """An API key, and what it allows.

    Attributes:
        name: for people, unique in the file.
        sha256: SHA-256 of the key.
        owner: whose videos it makes and sees; several keys may have one owner.
        priority: the highest priority that its requests may have.
        queued: most requests of the owner that may wait or run at a time; None for no bound.
        per_hour: most requests that the owner may make within an hour; None for no bound.
        webhook: where to send the owner's events.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: _Name
    sha256: Annotated[str, AfterValidator(_digest)] = Field(repr=False)
    owner: _Name
    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY), NUMBER] = 0
    queued: _Count | None = None
    per_hour: _Count | None = None
    webhook: Webhook | None = Field(default=None, repr=False)


class KeyFile(BaseModel):
    """Content of the file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Annotated[tuple[Key, ...], Field(max_length=10_000)] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [key.name for key in self.keys]
        if len({*names}) < len(names):
            raise ValueError("two keys have the same name")
        return self

    def find(self, token: str) -> Key | None:
        """Find the key whose token this is; takes as long for a wrong token as for a right one."""
        digest, found = digest_of(token), None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def write(self, path: Path, text: str | None = None) -> None:
        """Write the file, whole or not at all: a new one readable by its owner alone, an old one by whoever
        could read it before.

        Args:
            text: the text to write, with comments, if it has this content.

        Raises:
            BadRequestError: it belongs to another user, whose server could not read it any more.
        """
        with whole_file(path) as temporary:
            temporary.chmod(0o600)
            if path.exists():
                before = path.stat()
                with refusing("keys", path):
                    os.chown(temporary, before.st_uid, before.st_gid)
                    temporary.chmod(stat.S_IMODE(before.st_mode))
            if text is None or not self._is(text, temporary):
                content = self.model_dump(mode="json", exclude_none=True)
                temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def _is(self, text: str, file: Path) -> bool:
        """Write `text` to `file`; return whether this is its content."""
        file.write_text(text, encoding="utf-8", newline="")
        try:
            return read_keys(file) == self
        except BadRequestError:
            return False


def digest_of(token: str) -> str:
    """Digest of a key, as the file stores it."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


def new_token() -> str:
    """Draw a new key."""
    return f"{PREFIX}{secrets.token_urlsafe(32)}"


def new_secret() -> str:
    """Draw a new secret that signs a webhook's messages."""
    return SECRET + base64.b64encode(secrets.token_bytes(32)).decode()


def make_key(token: str, **allowed: Any) -> Key:
    """Make the entry of a key in the file.

    Args:
        token: the key.
        allowed: fields of `Key`.

    Raises:
        BadRequestError: a field is out of bounds.
    """
    try:
        return Key(sha256=digest_of(token), **allowed)
    except ValidationError as error:
        raise BadRequestError(explain(error, model=Key)) from None


def read_keys(path: Path) -> KeyFile:
    """Read a file of keys.

    Raises:
        BadRequestError: it cannot be read, or is not a file of keys.
    """
    return YamlFile.read(path, "keys").parse(KeyFile)


def add_key(path: Path, key: Key) -> None:
    """Add a key to a file, which is made if it is missing.

    Raises:
        BadRequestError: the file has a key of this name, is not a file of keys, or cannot be written.
    """
    with _changing(path):
        known = read_keys(path).keys if path.exists() else ()
        if any(one.name == key.name for one in known):
            raise BadRequestError(f"name: {key.name!r} given; {str(path)!r} has a key of this name")
        plain = key.model_dump(mode="json", exclude_none=True)
        text = with_key(read_text(path, "keys"), plain) if path.exists() else None
        KeyFile(keys=(*known, key)).write(path, text)


def remove_key(path: Path, name: str) -> None:
    """Remove a key from a file: a running server refuses it from then on.

    Raises:
        BadRequestError: the file has no key of this name, or cannot be written.
    """
    read_keys(path)  # a file that is missing is refused, and its folder is not made
    with _changing(path):
        known = read_keys(path).keys
        number = next((number for number, one in enumerate(known) if one.name == name), None)
        if number is None:
            names = ", ".join(one.name for one in known) or "none"
            raise BadRequestError(f"name: {name!r} given; the keys are {names}")
        left = (*known[:number], *known[number + 1 :])
        KeyFile(keys=left).write(path, without_key(read_text(path, "keys"), number))


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Change a file of keys while no other process does, or that one's change would be undone.

    Raises:
        BadRequestError: it cannot be written, or others change files in its folder all the time.
    """
    check_writable(path, overwrite=True, field="keys")
    with alone_in(path.parent, field="keys"):
        yield
