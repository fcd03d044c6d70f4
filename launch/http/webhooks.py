"""Sends webhooks: signed messages to an owner's server that a video has ended, with retries.

Body and signature are those of OpenAI's webhooks (Standard Webhooks), so its client can check them. Addresses
come from the file of keys alone: a client cannot make this server send anything anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from launch.http.deliveries import Deliveries, Delivery
from launch.http.keys import SECRET, Key, Webhook
from launch.http.service import Service
from launch.serve.entries import State

log = logging.getLogger("launch")

EVERY = 1.0  # seconds between two looks at what is to be sent
_TIMEOUT = 10.0  # seconds for an answer
_TRIES = 8
_FIRST, _LONGEST = 5.0, 3600.0  # seconds before the second try, fourfold before each further one
_AT_A_TIME = 4


class Webhooks:
    """Sends webhooks; messages that are unsent when the server ends are sent by the next one."""

    def __init__(self, service: Service):
        self._keys, self._deliveries = service.keys, Deliveries(service.queue)

    def send(self) -> None:
        """Send all messages that are due."""
        hooks = targets(self._keys.all)
        self._deliveries.collect(hooks)
        due = self._deliveries.due(lease=2 * _TIMEOUT, limit=_AT_A_TIME)
        with ThreadPoolExecutor(_AT_A_TIME) as senders:
            for delivery, problem in zip(due, senders.map(self._try, due), strict=True):
                self._note(delivery, problem)

    def _try(self, delivery: Delivery) -> str:
        """Send once; returns why it failed, or nothing."""
        hook = targets(self._keys.all).get(delivery.owner, {}).get(delivery.url)
        return "" if hook is None else post(hook, delivery)  # the owner does not want it any more

    def _note(self, delivery: Delivery, problem: str) -> None:
        tries = delivery.tries + 1
        if not problem:
            self._deliveries.done(delivery)
        elif tries >= _TRIES:
            log.warning(
                "webhook %s of %s is given up after %d tries: %s", delivery.id, delivery.owner, tries, problem
            )
            self._deliveries.done(delivery)
        else:
            self._deliveries.later(delivery, min(_FIRST * 4 ** (tries - 1), _LONGEST))


def targets(keys: tuple[Key, ...]) -> dict[str, dict[str, Webhook]]:
    """Webhooks by owner and address."""
    found: dict[str, dict[str, Webhook]] = {}
    for key in keys:
        if key.webhook is not None:
            found.setdefault(key.owner, {})[key.webhook.url] = key.webhook
    return found


def signature(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """Sign a message, for the header `webhook-signature`."""
    key = base64.b64decode(secret.removeprefix(SECRET))
    signed = f"{id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def post(hook: Webhook, delivery: Delivery) -> str:
    """Send a message once; return why it failed, or an empty text."""
    body = json.dumps(_message(delivery)).encode()
    now = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "lockstep",
        "webhook-id": delivery.id,
        "webhook-timestamp": str(now),
        "webhook-signature": signature(hook.secret, delivery.id, now, body),
    }
    request = urllib.request.Request(hook.url, body, headers, method="POST")
    try:
        with urllib.request.build_opener(_Unredirected).open(request, timeout=_TIMEOUT) as answer:
            return "" if answer.status < 300 else f"it answered {answer.status}"
    except urllib.error.HTTPError as error:
        return f"it answered {error.code}"
    except (OSError, HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _message(delivery: Delivery) -> Mapping[str, Any]:
    kind = "video.completed" if delivery.state is State.DONE else "video.failed"
    return {
        "id": delivery.id,
        "object": "event",
        "type": kind,
        "created_at": int(delivery.at),
        "data": {"id": delivery.video},
    }


class _Unredirected(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the address in the file of keys is the only one that is meant."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None
