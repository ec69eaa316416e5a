"""Requests that wait at the same time form a batch at once, and not after a time without any.

Inspect's provider `hf` generates a batch that is not full when no request has come for two seconds. It is full, to
`hf`, with as many requests as their `max_connections`: here they learn how many wait together, and pass that on.
"""

import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.lowlevel import RunVar

QUIET_SECONDS = 0.1
"""A batch begins when no further request came for so long, and none is generated."""


class _Batch:
    def __init__(self) -> None:
        self.size = 0
        self.is_closed = anyio.Event()


class _Requests:
    """The requests to one model, in one event loop."""

    def __init__(self) -> None:
        self._running = 0
        self._open: _Batch | None = None

    @asynccontextmanager
    async def join(self, limit: int) -> AsyncIterator[int]:
        batch = self._open
        is_first = batch is None
        if batch is None:
            batch = self._open = _Batch()
        batch.size += 1
        if batch.size >= limit:
            self._close(batch)
        if is_first:
            await self._hold_open(batch)
        else:
            await batch.is_closed.wait()
        self._running += 1
        try:
            yield batch.size
        finally:
            self._running -= 1

    async def _hold_open(self, batch: _Batch) -> None:
        try:
            while not batch.is_closed.is_set():
                size = batch.size
                with anyio.move_on_after(QUIET_SECONDS):
                    await batch.is_closed.wait()
                if batch.size == size and not self._running:
                    break
        finally:  # also when this request is cancelled: the others wait for it
            self._close(batch)

    def _close(self, batch: _Batch) -> None:
        batch.is_closed.set()
        if self._open is batch:
            self._open = None


_REQUESTS: "RunVar[weakref.WeakKeyDictionary[Any, _Requests]]" = RunVar("lorasweep_requests")


@asynccontextmanager
async def join_batch(model: object, limit: int) -> AsyncIterator[int]:
    """Wait until a request's batch begins, with those to the same model that wait too; give the batch's size.

    What the context holds is the request's generation; `limit` is the largest size of a batch.
    """
    try:
        requests = _REQUESTS.get()
    except LookupError:
        requests = weakref.WeakKeyDictionary()
        _REQUESTS.set(requests)
    async with requests.setdefault(model, _Requests()).join(limit) as size:
        yield size
