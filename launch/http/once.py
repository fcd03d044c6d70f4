"""Requests that are carried out once: what the header `Idempotency-Key` of an earlier one has made."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from typing import Annotated, Any

from fastapi import Header

from launch.http.errors import ApiError

REPLAYED = "Idempotent-Replayed"  # header of an answer that an earlier request had got

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="Requests with the same key are carried out once.",
    ),
]


def once_of(key: str | None, request: Any) -> tuple[str, str] | None:
    """A request's idempotency key, and a digest that repetitions have in common; None without a key.

    Args:
        request: all that it asks for, for JSON.
    """
    if key is None:
        return None
    return key, hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def made_by(base: sqlite3.Connection, once: tuple[str, str], owner: str) -> str | None:
    """Id of what an owner's earlier request with the same key made, if there was one.

    Raises:
        ApiError: the key was used for another request.
    """
    key, digest = once
    row = base.execute(
        "SELECT digest, video FROM idempotency WHERE owner = ? AND key = ?", (owner, key)
    ).fetchone()
    if row is None:
        return None
    if row["digest"] != digest:
        said = "this Idempotency-Key was used for another request; use a new one"
        raise ApiError(422, "idempotency_key_reused", said, param="Idempotency-Key")
    return str(row["video"])


def remember(base: sqlite3.Connection, once: tuple[str, str], owner: str, id: str) -> None:
    """Store what a request has made, within the transaction `base`."""
    key, digest = once
    base.execute("INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)", (owner, key, digest, id, time.time()))
