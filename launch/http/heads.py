"""HEAD requests: answered as GET is, without the body."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Heads:
    """Middleware that answers HEAD as the app answers GET, and stops the app when the body begins.

    So no file is read, and no stream of events stays open.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        begun = asyncio.Event()

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
            else:
                begun.set()
                await asyncio.Event().wait()  # until the app is stopped

        answer = asyncio.ensure_future(self._app({**scope, "method": "GET"}, receive, told))
        body = asyncio.ensure_future(begun.wait())
        try:
            await asyncio.wait((answer, body), return_when=asyncio.FIRST_COMPLETED)
        finally:
            body.cancel()
            stopped = answer.cancel()
            await asyncio.wait((answer,))
        if not stopped:
            answer.result()  # it failed before there was a body
        await send({"type": "http.response.body", "body": b""})
