"""One event loop in one thread per process, on which LiteLLM runs, and the process's ledger and view of the servers.

With several loops (repeated `asyncio.run`, Jupyter) LiteLLM loses half of its events, and its HTTP clients belong to a
loop that is closed. A fork gets a new loop.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Hashable, Iterator
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from biollm.config import Cluster, Config
from biollm.config.paths import run_dir, state_dir
from biollm.errors import UsageError
from biollm.ledger import Ledger
from biollm.ledger.ratings import Ratings
from biollm.slurm.endpoints import Watch

T = TypeVar("T")
THREAD = "biollm"
_DEADLOCK = "A callback of the client (on_send, progress) called a blocking method, which would wait for itself."
_DEADLOCK_HINT = "Let the callback only take notes, or call the client from another thread."
_ENDED = "The process is ending: the client has closed its connections."
_ENDED_HINT = (
    "Send the request before the program ends, or from an exit handler that is registered after the first request."
)


class CallbackExitError(Exception):
    """Carries a SystemExit or KeyboardInterrupt of a callback to the caller; raised as such it would end the loop."""


class Background:
    """An event loop in a daemon thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.pid = os.getpid()
        self.loop = loop or asyncio.new_event_loop()
        self.kept: dict[Hashable, Any] = {}  # made once per process: ledgers, waterfalls, HTTP sessions
        self._making = threading.RLock()  # one `make` may need another
        self.closing: list[Callable[[], Awaitable[None]]] = []
        self._submitting, self._ended = threading.Lock(), False
        self._thread = threading.Thread(target=self.loop.run_forever, name=THREAD, daemon=True)
        self._thread.start()
        multiprocessing = sys.modules.get("multiprocessing")
        if multiprocessing and multiprocessing.parent_process():  # its forked children end without `atexit`
            end = threading.Thread(target=self._end, name="biollm-end")  # the process waits for it
            if multiprocessing.util.is_exiting():  # a thread has sent the first request, and the target has returned
                end.start()
            else:
                multiprocessing.util.Finalize(None, end.start, exitpriority=-1000)  # after those of others

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait for it; an interrupt of the caller cancels it."""
        if threading.current_thread() is self._thread:
            work.close()
            raise UsageError(_DEADLOCK, hint=_DEADLOCK_HINT)
        future = self._submit(work)
        try:
            return future.result()
        except CallbackExitError as error:
            raise error.args[0] from None
        except BaseException:
            future.cancel()
            raise

    async def arun(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop, from any loop; cancelling the caller cancels it."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        try:
            return await asyncio.wrap_future(self._submit(work))
        except CallbackExitError as error:
            raise error.args[0] from None

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Yield from an async generator that runs on the loop; leaving early cancels it."""
        if threading.current_thread() is self._thread:
            raise UsageError(_DEADLOCK, hint=_DEADLOCK_HINT)
        inbox: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        pump = self._submit(_pump(items, inbox.put))
        try:
            while not isinstance(item := inbox.get(), _End):
                yield item
            if item.error:
                raise item.error
        finally:
            pump.cancel()

    async def aiterate(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yield from an async generator that runs on the loop, to any loop."""
        inbox: asyncio.Queue[T | _End] = asyncio.Queue()
        caller = asyncio.get_running_loop()

        def put(item: T | _End) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed
                caller.call_soon_threadsafe(inbox.put_nowait, item)

        if caller is self.loop:
            pump = self.loop.create_task(_pump(items, inbox.put_nowait))
        else:
            pump = self._submit(_pump(items, put))
        try:
            while not isinstance(item := await inbox.get(), _End):
                yield item
            if item.error:
                raise item.error
        finally:
            pump.cancel()

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what this process keeps under `key`, from any thread; `make` is called on first use."""
        with self._making:
            if key not in self.kept:
                self.kept[key] = make()
            return self.kept[key]

    def stop_first(self) -> None:
        """Stop, at interpreter exit, before whatever was registered until now."""
        atexit.unregister(self._stop)
        atexit.register(self._stop)

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._submitting:  # a loop that has stopped would keep the caller waiting
            if self._ended:
                work.close()
                raise UsageError(_ENDED, hint=_ENDED_HINT)
            return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _end(self) -> None:
        """Write what waits, once the threads that the process waits for have ended: they may still send."""
        ends = {threading.main_thread(), threading.current_thread()}
        while others := [each for each in {*threading.enumerate()} - ends if each.is_alive() and not each.daemon]:
            others[0].join()
        self._stop()
        for each in [*self.kept.values()]:
            if isinstance(each, Ledger | Ratings):
                each.close()

    def _stop(self) -> None:
        if self.pid != os.getpid() or not self.loop.is_running():
            return
        with self._submitting:
            self._ended = True
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
    """Move items to the caller in one task, so that timeouts and context variables hold over the whole stream."""
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
    """Call a user's callback on the loop."""
    try:
        callback(*arguments)
    except (SystemExit, KeyboardInterrupt) as error:
        raise CallbackExitError(error) from None


async def apart(work: Callable[..., T], *arguments: Any) -> T:
    """Run blocking `work` in a daemon thread of its own; those of `asyncio.to_thread` are few, and delay the exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[..., None], outcome: object) -> None:
        if not done.cancelled():
            set_outcome(outcome)

    def run() -> None:
        try:
            outcome = (done.set_result, work(*arguments))
        except StopIteration as error:  # a future takes none
            outcome = (done.set_exception, RuntimeError(repr(error)))
        except (SystemExit, KeyboardInterrupt) as error:
            outcome = (done.set_exception, CallbackExitError(error))
        except BaseException as error:
            outcome = (done.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: no caller is waiting
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="biollm-apart", daemon=True).start()
    return await done


_current: dict[int, Background] = {}  # by process id
_locks: dict[int, threading.Lock] = {}  # as well: a fork may copy a lock that is held


def start_background(loop: asyncio.AbstractEventLoop) -> None:
    """Run this process's background work on `loop`, before anything else has started it."""
    _current[os.getpid()] = made = Background(loop)
    made.stop_first()


def started() -> Background | None:
    """Return this process's background loop if something has used it."""
    return _current.get(os.getpid())


def background() -> Background:
    """Return this process's background loop, started on first use and again after a fork."""
    with _locks.setdefault(pid := os.getpid(), threading.Lock()):
        if pid not in _current:
            _current.clear()
            _current[pid] = Background()
            _current[pid].stop_first()
        return _current[pid]


def ledger(config: Config | None = None) -> Ledger:
    """Return the process's ledger: of the state folder, and of the server that `config` names."""
    server = config.ledger if config and config.ledger.url else None
    here, folder = background(), state_dir()

    def make() -> Ledger:
        made = Ledger(folder, server=server)
        here.stop_first()  # what is cancelled at exit is then still written
        return made

    return here.once(("ledger", folder, server), make)


def ratings() -> Ratings:
    """Return the process's ratings of the state folder."""
    here, folder = background(), state_dir()

    def make() -> Ratings:
        made = Ratings(folder)
        here.stop_first()
        return made

    return here.once(("ratings", folder), make)


def watch(cluster: Cluster) -> Watch:
    """Return the process's view of the site's running servers."""
    return background().once(("watch", run_dir(cluster), cluster.trusted_owners), partial(Watch, cluster))
