"""Authentication: the key of a request, from its header `Authorization: Bearer KEY`."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from launch.http.errors import ApiError
from launch.http.keys import LOCAL, MOST_PRIORITY, Key, KeyFile, read_keys
from runtime.errors import BadRequestError

log = logging.getLogger("launch")

ANYONE = Key(name=LOCAL, sha256="0" * 64, owner=LOCAL, priority=MOST_PRIORITY)
_bearer = HTTPBearer(auto_error=False, description="A key of the server's file of keys.")


class Keys:
    """API keys of a server. Changes to their file take effect at the next request.

    Args:
        path: the file of keys; None for a server that anyone on its machine may use.

    Raises:
        BadRequestError: the file cannot be read, is not a file of keys, or has none.
    """

    def __init__(self, path: Path | None):
        self._path, self._lock = path, threading.Lock()
        self._known, self._read = KeyFile(), (0, 0, 0)
        if path is not None:
            self._read = _state(path)
            self._known = read_keys(path)
            if not self._known.keys:
                raise BadRequestError(f"keys: {str(path)!r} has no key; `lockstep keys add` makes one")

    @property
    def open(self) -> bool:
        """Whether the server needs no key."""
        return self._path is None

    @property
    def all(self) -> tuple[Key, ...]:
        """All keys that the file holds now."""
        if self._path is not None:
            self._refresh()
        return self._known.keys

    @property
    def changed(self) -> bool:
        """Whether the file is another one than was read last."""
        return self._path is not None and _state(self._path) != self._read

    def of(self, token: str | None) -> Key:
        """Key that a request was sent with.

        Raises:
            ApiError: the request has no key, or an unknown one.
        """
        if self._path is None:
            return ANYONE
        self._refresh()
        key = None if token is None else self._known.find(token)
        if key is None:
            said = "no API key given" if token is None else "this API key is not known here"
            raise ApiError(
                401,
                "invalid_api_key",
                f"{said}; send the header `Authorization: Bearer KEY`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return key

    def _refresh(self) -> None:
        """Read the file again if it has changed; one that is broken meanwhile changes nothing."""
        assert self._path is not None
        with self._lock:
            try:
                found = _state(self._path)
                if found == self._read:
                    return
                self._read = found
                self._known = read_keys(self._path)
            except (OSError, BadRequestError) as error:
                log.warning("the changed file of keys cannot be used, so its last keys stay valid: %s", error)


def _state(path: Path) -> tuple[int, int, int]:
    """State of the file, which differs after it was written; reading a missing file is refused later."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_ino, found.st_size


async def caller(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Key:
    """Key of the request that is being answered: a dependency of routes.

    A file of keys that has changed is read in a thread, as that takes seconds for thousands of them. If not,
    the request does not wait: the body of a client that leaves at once is lost if nobody is reading it.
    """
    keys: Keys = request.app.state.service.keys
    token = None if given is None else given.credentials
    return await run_in_threadpool(keys.of, token) if keys.changed else keys.of(token)


Caller = Annotated[Key, Depends(caller)]
