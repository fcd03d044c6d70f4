"""Sends webhooks: signed messages to an owner's server that a video has ended, with retries.

Body and signature are those of OpenAI's webhooks (Standard Webhooks), so its client can check them. Addresses
come from the file of keys alone: a client cannot make this server send anything anywhere.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import ssl
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from launch.http.deliveries import Address, Deliveries, Delivery
from launch.http.keys import SECRET, Key, Webhook
from launch.http.service import Service
from launch.serve.entries import State

log = logging.getLogger("launch")
logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs addresses, in which tokens may be

EVERY = 1.0  # seconds between two looks at what is to be sent
_TIMEOUT = 10.0  # seconds until an answer has come, however slowly
_TRIES = 8
_FIRST, _LONGEST = 5.0, 3600.0  # seconds before the second try, fourfold before each further one
_LANES, _AT_A_TIME = 32, 8  # addresses at a time, and messages to one of them

_Hooks = Mapping[str, Mapping[str, Webhook]]
"""Webhooks by owner and address."""


class Webhooks:
    """Sends webhooks; messages that are unsent when the server ends are sent by the next one.

    Each address has a lane of its own: one that does not answer delays nobody else's messages.
    """

    def __init__(self, service: Service):
        self._keys, self._deliveries, self._over = service.keys, Deliveries(service.queue), False

    def stop(self) -> None:
        """Make `send` return soon; what is on its way then is sent again by the next server."""
        self._over = True

    def send(self) -> None:
        """Send all messages that are due, and those that become due meanwhile."""
        hooks, due = self._due(())
        if due:
            asyncio.run(self._sent(hooks, due))

    def _due(self, busy: Collection[Address]) -> tuple[_Hooks, list[Delivery]]:
        hooks = targets(self._keys.all)
        self._deliveries.collect(hooks)
        lanes = _LANES - len(busy)
        return hooks, self._deliveries.due(lease=2 * _TIMEOUT, limit=_AT_A_TIME, lanes=lanes, busy=busy)

    async def _sent(self, hooks: _Hooks, due: Sequence[Delivery]) -> None:
        """Send messages until none is due and none on its way."""
        names = ThreadPoolExecutor(_LANES * _AT_A_TIME)  # a host's name may take long to be found, too
        asyncio.get_running_loop().set_default_executor(names)
        sent: dict[asyncio.Task[None], Address] = {}
        every = httpx.Limits(max_connections=None)
        trusted = ssl.create_default_context()  # what this machine trusts
        async with httpx.AsyncClient(verify=trusted, timeout=_TIMEOUT, limits=every) as client:
            try:
                while (due or sent) and not self._over:
                    for one in due:
                        hook = hooks.get(one.owner, {}).get(one.url)
                        sent[asyncio.create_task(self._sent_one(client, hook, one))] = one.address
                    done, _ = await asyncio.wait(sent, timeout=EVERY, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        del sent[task]
                        task.result()
                    hooks, due = await asyncio.to_thread(self._due, {*sent.values()})
            finally:
                for task in sent if self._over else ():
                    task.cancel()
                await asyncio.gather(*sent, return_exceptions=True)

    async def _sent_one(self, client: httpx.AsyncClient, hook: Webhook | None, delivery: Delivery) -> None:
        """Send a message once, if it is still wanted, and note how that went."""
        problem = "" if hook is None else await _post(client, hook, delivery)
        await asyncio.to_thread(self._note, delivery, problem)

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


def targets(keys: tuple[Key, ...]) -> _Hooks:
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


async def _post(client: httpx.AsyncClient, hook: Webhook, delivery: Delivery) -> str:
    """Send a message once; return why it failed, or an empty text. Redirects are not followed."""
    body = json.dumps(_message(delivery)).encode()
    now = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "lockstep",
        "webhook-id": delivery.id,
        "webhook-timestamp": str(now),
        "webhook-signature": signature(hook.secret, delivery.id, now, body),
    }
    try:
        async with (
            asyncio.timeout(_TIMEOUT),
            client.stream("POST", hook.url, content=body, headers=headers) as answer,
        ):
            return "" if answer.is_success else f"it answered {answer.status_code}"
    except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
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
