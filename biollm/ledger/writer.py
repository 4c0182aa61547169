"""A thread that writes jobs to a file or a server, one transaction per batch."""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from biollm.ledger.sqlite import Database

Job = TypeVar("Job")

_LINGER = 0.02  # seconds that jobs without a waiting caller are held to fill a batch; well under the 50 ms promised
_BACKLOG = 10_000  # jobs kept in memory while the file cannot be written
_RETRY = 5.0  # seconds until they are tried again, if no other job comes


class Writer(Generic[Job]):
    """Hands what is put in to `write`, in batches; its daemon thread starts on first use, and ends with `close`.

    `settle` gets each batch once it is written, or with the reason why it is not; jobs that are not urgent are then
    tried again with the next batch.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[Job]], None],
        settle: Callable[[Sequence[Job], Exception | None], None],
        close: Callable[[], None],
    ) -> None:
        self._name, self._write, self._settle, self._close = name, write, settle, close
        self._waiting: deque[tuple[Job | threading.Event | None, bool]] = deque()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # gets whether the job is urgent
        self._idle = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, job: Job | threading.Event | None, *, urgent: bool = False) -> None:
        """Hand in a job. A caller waits for one that is `urgent`; another may be held for 20 ms."""
        self._waiting.append((job, urgent))
        if urgent or self._idle:  # waking a thread takes ten times as long as handing in a job
            self._wake.put(urgent)
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    self._thread.start()

    def flush(self, timeout: float) -> None:
        """Wait, at most `timeout` seconds, until what was handed in so far has been tried."""
        if self._thread:
            self.put(tried := threading.Event(), urgent=True)
            tried.wait(timeout)

    def close(self, timeout: float) -> None:
        """Write what waits, close the file and end the thread, in at most `timeout` seconds."""
        if self._thread:
            self.put(None, urgent=True)
            self._thread.join(timeout)

    def _run(self) -> None:
        backlog: deque[Job] = deque(maxlen=_BACKLOG)
        closing = False
        while not closing:
            batch = self._gather(_RETRY if backlog else None)
            closing = any(job is None for job, _ in batch)
            jobs = [(job, urgent) for job, urgent in batch if not isinstance(job, threading.Event | None)]
            if jobs or backlog:
                self._attempt(jobs, backlog)
            for job, _ in batch:
                if isinstance(job, threading.Event):
                    job.set()
        self._close()

    def _attempt(self, new: Sequence[tuple[Job, bool]], backlog: deque[Job]) -> None:
        jobs = [*backlog, *(job for job, _ in new)]
        failure: Exception | None = None
        try:
            self._write(jobs)
            backlog.clear()
        except (sqlite3.OperationalError, OSError) as error:
            failure = error
            backlog.extend(job for job, urgent in new if not urgent)
        except Exception as error:  # a job that can never be written must not hold up the others
            failure = error
            backlog.clear()
        self._settle(jobs, failure)

    def _gather(self, patience: float | None) -> Sequence[tuple[Job | threading.Event | None, bool]]:
        if not self._woken(_LINGER):
            self._idle = True  # first: what is handed in from now on wakes this thread
            urgent = bool(self._waiting) or self._woken(patience)
            self._idle = False
            if not urgent:
                self._woken(_LINGER)
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def _woken(self, patience: float | None) -> bool:
        """Wait until put() wakes this thread; return whether for an urgent job."""
        urgent = False
        with suppress(queue.Empty):
            urgent = self._wake.get(timeout=patience)
            while True:
                urgent |= self._wake.get_nowait()
        return urgent


def file_writer(
    database: Database,
    write: Callable[[sqlite3.Connection, Sequence[Job]], None],
    settle: Callable[[Sequence[Job], Exception | None], None],
) -> Writer[Job]:
    """Return a writer to an SQLite file."""
    name = f"biollm {database.path.stem}"
    return Writer(name, lambda jobs: database.write(lambda db: write(db, jobs)), settle, database.close)
