"""One event loop in one thread per process, on which everything of LiteLLM runs.

With several loops LiteLLM loses half of its events and its HTTP clients belong to a loop that is gone (repeated
`asyncio.run`, Jupyter). A fork gets a new loop.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError as FutureCancelled
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from biollm.config import Cluster
from biollm.config.paths import run_dir, state_dir
from biollm.errors import UsageError
from biollm.ledger import Ledger
from biollm.slurm.endpoints import Watch

T = TypeVar("T")
THREAD = "biollm"
_SELF = "A callback of the client (on_send, progress) called one of its blocking methods, which would wait for itself."
_SELF_HINT = "Let the callback only take notes, or call the client from another thread."


class CallbackExitError(Exception):
    """Carries a SystemExit or KeyboardInterrupt of a callback to the caller; raised as such it would end the loop."""


class Background:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.kept: dict[Any, Any] = {}  # ledgers and waterfalls, made once per process
        self.closing: list[Callable[[], Awaitable[None]]] = []
        self._thread = threading.Thread(target=self.loop.run_forever, name=THREAD, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait for it; an interrupt of the caller cancels it.

        Raises:
            UsageError: This is the loop's own thread, which would wait for itself.
        """
        if self.here():
            work.close()
            raise UsageError(_SELF, hint=_SELF_HINT)
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except CallbackExitError as error:
            raise error.args[0] from None
        except BaseException:
            future.cancel()
            raise

    async def arun(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop, from another loop or from there; cancelling the caller cancels it."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))
        except CallbackExitError as error:
            raise error.args[0] from None

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Yield from an async generator that runs on the loop; leaving early cancels it. Raises as `run` does."""
        if self.here():
            raise UsageError(_SELF, hint=_SELF_HINT)
        inbox: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        pump = asyncio.run_coroutine_threadsafe(_pump(items, inbox.put), self.loop)
        try:
            while not isinstance(item := inbox.get(), _End):
                yield item
            if item.error:
                raise item.error
        finally:
            pump.cancel()

    async def aiterate(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yield from an async generator that runs on the loop, on the caller's loop, which may be the same."""
        inbox: asyncio.Queue[T | _End] = asyncio.Queue()
        caller = asyncio.get_running_loop()

        def put(item: T | _End) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed: nobody listens any more
                caller.call_soon_threadsafe(inbox.put_nowait, item)

        if caller is self.loop:
            pump = asyncio.create_task(_pump(items, inbox.put_nowait))
        else:
            pump = asyncio.run_coroutine_threadsafe(_pump(items, put), self.loop)
        try:
            while not isinstance(item := await inbox.get(), _End):
                yield item
            if item.error:
                raise item.error
        finally:
            pump.cancel()

    def here(self) -> bool:
        """Return whether the caller is in the loop's thread."""
        return threading.current_thread() is self._thread

    def stop_first(self) -> None:
        """Stop, at interpreter exit, before whatever was registered until now."""
        atexit.unregister(self.stop)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Cancel what runs, close what was opened, and end the thread; at interpreter exit."""
        if self.pid != os.getpid() or not self.loop.is_running():
            return
        with suppress(TimeoutError, FutureCancelled):
            asyncio.run_coroutine_threadsafe(self._finish(), self.loop).result(timeout=2)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=2)

    async def _finish(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for close in self.closing:
            with suppress(Exception):
                await close()


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


async def _pump(items: AsyncGenerator[T, None], put: Callable[[T | _End], None]) -> None:
    """Move items to the caller from one task, so that timeouts and context variables hold over the whole stream."""
    try:
        async for item in items:
            put(item)
    except asyncio.CancelledError:
        put(_End(FutureCancelled()))
        raise
    except Exception as error:
        put(_End(error.args[0] if isinstance(error, CallbackExitError) else error))
    else:
        put(_End())
    finally:
        await items.aclose()


def called(callback: Callable[..., object], *arguments: object) -> None:
    """Call a callback of the caller's on the loop."""
    try:
        callback(*arguments)
    except (SystemExit, KeyboardInterrupt) as error:
        raise CallbackExitError(error) from None


async def apart(work: Callable[..., T], *arguments: Any) -> T:
    """Run blocking `work` in a daemon thread of its own and return its result.

    `asyncio.to_thread` shares a few threads with every other caller and keeps the process alive until they are done; a
    StopIteration in one of them leaves the caller waiting for ever.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(cast("T", result))
        else:
            exits = isinstance(error, SystemExit | KeyboardInterrupt)
            lost = isinstance(error, StopIteration)  # a future takes none
            done.set_exception(CallbackExitError(error) if exits else RuntimeError(repr(error)) if lost else error)

    def run() -> None:
        result, failed = None, None
        try:
            result = work(*arguments)
        except BaseException as error:
            failed = error
        with suppress(RuntimeError):  # the loop is closed: no caller is waiting
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, name="biollm-apart", daemon=True).start()
    return await done


_current: list[Background] = []
_lock = threading.Lock()


def background() -> Background:
    """Return this process's background loop, started on first use and again after a fork."""
    with _lock:
        if not _current or _current[0].pid != os.getpid():
            _current[:] = [Background()]
            _current[0].stop_first()
        return _current[0]


def _unlock_after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_after_fork)


def ledger() -> Ledger:
    """Return the process's ledger of the state folder."""
    here, key = background(), ("ledger", state_dir())
    if key not in here.kept:
        here.kept[key] = Ledger(state_dir())
        here.stop_first()  # what is cancelled at exit is then still written
    return here.kept[key]


def watch(cluster: Cluster) -> Watch:
    """Return the process's view of the servers that run at the site."""
    kept, key = background().kept, ("watch", run_dir(cluster), cluster.trusted_owners)
    if key not in kept:
        kept[key] = Watch(cluster)
    return kept[key]
