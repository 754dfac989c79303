"""The thread in which an encoder reads texts: one batch at a time, and a bounded number of requests before it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmctl.ort.encoder import OrtEncoder
from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import Exchange
from llmctl_serve.worker import stopping


class EncoderThread:
    """One encoder's own thread. A batch takes all cores already, so a second one at the same time would gain nothing.

    All methods but `close` belong to the event loop. `most` requests wait at most; a further one is refused.
    """

    def __init__(self, encoder: OrtEncoder, most: int, name: str = "") -> None:
        self._encoder, self._most = encoder, most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"encoder {name}".strip())
        self._closed = False
        self._here = 0
        """Requests that wait or run."""

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return max(0, self._here - 1)

    async def embed(self, ids: Sequence[Sequence[int]], exchange: Exchange) -> Any:
        """Vectors `(len(ids), H)`. Whoever gives up before its turn costs nothing: cancel the task.

        ApiError 429 if too many wait, 503 if the model is closed; what the encoder raises.
        """
        if self._here > self._most:
            raise ApiError(429, f"{self.depth} requests are waiting already", code="queue_full", headers=AGAIN)

        def run() -> Any:
            exchange.admitted()
            return self._encoder.embed(ids)

        try:
            future = self._thread.submit(run)
        except RuntimeError:  # closed meanwhile
            raise stopping() from None
        self._here += 1
        loop = asyncio.get_running_loop()
        # Also when its task was cancelled: a batch that has begun cannot be interrupted, and goes on taking its place.
        future.add_done_callback(lambda _: _told(loop, self._left))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise stopping() from None
            raise

    def _left(self) -> None:
        self._here -= 1

    def close(self) -> None:
        """Take nothing more, give up what waits, and end with the batch that runs."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)


AGAIN = {"Retry-After": "1"}


def _told(loop: asyncio.AbstractEventLoop, action: Any) -> None:
    try:
        loop.call_soon_threadsafe(action)
    except RuntimeError:  # the loop has ended, and the count with it
        return
