"""The asynchronous way in: any number of streams share the steps, which run in a thread.

One task steps the engine while there is work; pieces reach the streams' event loop through queues.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from dvpa.engine.outputs import Piece

Listener = Callable[[Piece], None]
News = asyncio.Queue[Piece | BaseException]


class Steps(Protocol):
    """What is stepped: the engine."""

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        ...

    def step(self) -> list[Piece]:
        """One pass."""
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request."""
        ...


class Streams:
    """Streams of one engine, in one event loop at a time."""

    def __init__(self, engine: Steps) -> None:
        self._engine = engine
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dvpa-engine")
        self._driver: asyncio.Task[None] | None = None
        self._open: set[News] = set()

    async def stream(
        self, add: Callable[[Listener], tuple[str, int]], after: Listener | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of one request; leaving early cancels it.

        Args:
            add: queues the request with a listener; its id, and how many completions it has.
            after: called, in the event loop, with what comes once the stream has been left.
        """
        loop, news = asyncio.get_running_loop(), News()

        def take(piece: Piece) -> None:
            if news in self._open or after is None:
                news.put_nowait(piece)
            else:
                after(piece)

        def listener(piece: Piece) -> None:
            loop.call_soon_threadsafe(take, piece)

        request_id, left = "", 0
        self._open.add(news)
        try:
            request_id, left = add(listener)
            while left:
                if self._driver is None or self._driver.done():
                    self._driver = loop.create_task(self._drive(loop))
                piece = await news.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.finish_reason is not None
                yield piece
        finally:
            self._open.discard(news)
            while after is not None and not news.empty():
                unread = news.get_nowait()
                if isinstance(unread, Piece):
                    left -= unread.finish_reason is not None
                    after(unread)
            if left:
                self._engine.cancel(request_id)

    def close(self) -> None:
        """End the thread, after the step it is in."""
        self._worker.shutdown(wait=True)

    async def _drive(self, loop: asyncio.AbstractEventLoop) -> None:
        """Step while there is work; what ends this early ends the streams that wait for it."""
        try:
            while self._engine.has_work:
                await loop.run_in_executor(self._worker, self._engine.step)
        except BaseException as error:
            for news in self._open:
                news.put_nowait(error)
            if not isinstance(error, Exception):
                raise
