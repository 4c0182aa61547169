"""SQLite files that many processes write to, on local disks and on network file systems, by one thread each.

SQLite lacks a queue in front of its lock (its waiters sleep up to 100 ms at a time and starve each other),
knows nothing of network file systems (WAL does not work there), and leaves a damaged file to its user.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import queue
import re
import sqlite3
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from biollm._files import create

Job = TypeVar("Job")
_log = logging.getLogger("biollm")

BOUND = 0.25  # seconds that anybody waits for a file
_LINGER = 0.02  # seconds that work nobody waits for may wait for company; well under the 50 ms promised
_OWED = 10_000  # jobs kept in memory while a file cannot be written
_RETRY = 5.0  # seconds until they are tried again, if no other job comes
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

Prepare = Callable[[sqlite3.Connection], None]

_NETWORK = re.compile(
    r"nfs\d?|lustre|gpfs|beegfs\w*|cifs|smb\d?|ceph|glusterfs|afs|9p|pvfs2|orangefs|panfs|wekafs|virtiofs"
    r"|fuse\.(sshfs|ceph.*|glusterfs|gpfs|juicefs|s3fs|rclone|gcsfuse)"
)


def on_network(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Return whether `folder` lies on a network file system, by the type of its mount."""
    where = folder.resolve()
    depth, kind = -1, ""
    with suppress(OSError):
        for line in mounts.read_text(errors="replace").splitlines():
            point, fstype = line.split()[1:3]
            path = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point))
            if where.is_relative_to(path) and len(path.parts) >= depth:  # a later mount hides an earlier one
                depth, kind = len(path.parts), fstype
    return bool(_NETWORK.fullmatch(kind))


def read(
    path: Path,
    sql: str,
    arguments: Sequence[object] = (),
    *,
    patience: float = BOUND,
    prepare: Prepare | None = None,
) -> list[Any]:
    """Return the rows of one query on a connection of its own; none while the file or its table is not made.

    `prepare` is called with the connection before.

    Raises:
        sqlite3.Error: The file cannot be read within `patience` seconds.
    """
    if not path.exists():
        return []
    with reading(path, patience) as db:
        try:
            if prepare:
                prepare(db)
            return db.execute(sql, arguments).fetchall()
        except sqlite3.OperationalError as error:
            if str(error).startswith("no such table"):
                return []
            raise


def reading(path: Path, patience: float) -> closing[sqlite3.Connection]:
    """Open an existing file to read it; each query waits at most `patience` seconds."""
    # "rw" makes no file and falls back to reading; "ro" could not undo what a killed writer left half done.
    return closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=patience))


class Database:
    """One SQLite file for one writing thread; opened on first use, and again when another takes its place.

    Local disks get WAL; network file systems a rollback journal. Either way writers queue in a blocking lock on a
    file beside it, those of one process too. Files are 0600; in a folder with the setgid bit, which a group shares,
    0660.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        *,
        network: bool,
        synchronous: str,
        patience: float,
        migrate: Prepare | None = None,
    ) -> None:
        self.path, self._schema, self._patience, self._migrate = path, schema, patience, migrate
        self._pragmas = (f"journal_mode={'PERSIST' if network else 'WAL'}", f"synchronous={synchronous}")
        self._db: sqlite3.Connection | None = None
        self._inode = self._queue = -1

    def write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Run `work` in one transaction. A damaged file is set aside, and `work` starts on a fresh one.

        Raises:
            sqlite3.Error: The file is locked for `patience` seconds, not writable, or the disk is full.
            OSError: The folder cannot be made or used.
        """
        try:
            try:
                self._write(work)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
                self._set_aside(error)
                self._write(work)
        except BaseException:
            self.close()  # the next try starts from the folder up
            raise

    def close(self) -> None:
        """Close the file and leave the queue."""
        self._forget()
        if self._queue >= 0:
            os.close(self._queue)
            self._queue = -1

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        with self._turn(), self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            work(db)

    @contextmanager
    def _turn(self) -> Generator[None]:
        if self._queue < 0:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock")
            create(lock)
            self._queue = os.open(lock, os.O_RDWR)
        _set_lock(self._queue, fcntl.F_WRLCK)
        try:
            yield
        finally:
            _set_lock(self._queue, fcntl.F_UNLCK)

    def _connection(self) -> sqlite3.Connection:
        if self._db and self._inode == _inode(self.path):
            return self._db
        self._forget()
        create(self.path)
        self._inode = _inode(self.path)
        db = sqlite3.connect(self.path, timeout=self._patience, isolation_level=None, check_same_thread=False)
        try:
            for pragma in self._pragmas:
                db.execute(f"PRAGMA {pragma}")
            db.executescript(self._schema)
            if self._migrate:
                self._migrate(db)
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _forget(self) -> None:
        if self._db:
            self._db.close()
            self._db = None

    def _set_aside(self, error: Exception) -> None:
        self._forget()
        with self._turn():
            if self._inode != _inode(self.path):
                return  # another process has done it
            aside = next(name for n in itertools.count(1) if not (name := Path(f"{self.path}.corrupt-{n}")).exists())
            for suffix in ("-wal", "-shm", "-journal", ""):
                with suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        _log.warning("%s is damaged (%s): it is kept as %s, and a new one begins.", self.path, error, aside.name)


def _set_lock(file: int, kind: int) -> None:
    """Take or leave the lock. It is the open file's, not the process's as `lockf`'s: threads exclude each other too,
    and a process that waits for two files with two threads does not look like a deadlock."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi0q", kind, os.SEEK_SET, 0, 0, 0))  # struct flock


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1


class Writer(Generic[Job]):
    """A daemon thread that writes what waits to one file, one transaction per batch; started on first use.

    Args:
        database: The file.
        write: Writes a batch inside the transaction.
        settle: Told of each batch when it is on disk, or why it is not; then jobs that nobody waits for are
            tried again with the next batch.
    """

    def __init__(
        self,
        database: Database,
        write: Callable[[sqlite3.Connection, Sequence[Job]], None],
        settle: Callable[[Sequence[Job], Exception | None], None],
    ) -> None:
        self._database, self._write, self._settle = database, write, settle
        self._waiting: queue.SimpleQueue[tuple[Job | threading.Event | None, bool]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, job: Job | threading.Event | None, *, urgent: bool = False) -> None:
        """Hand in a job. One that is `urgent` has somebody waiting; another may wait 20 ms for company."""
        self._waiting.put((job, urgent))
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    name = f"biollm {self._database.path.stem}"
                    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
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
        owed: deque[Job] = deque(maxlen=_OWED)
        closing = False
        while not closing:
            batch = self._gather(_RETRY if owed else None)
            events = [job for job, _ in batch if isinstance(job, threading.Event)]
            closing = any(job is None for job, _ in batch)
            jobs = [(job, urgent) for job, urgent in batch if not isinstance(job, threading.Event | None)]
            self._attempt(jobs, owed)
            for event in events:
                event.set()
        self._database.close()

    def _attempt(self, new: Sequence[tuple[Job, bool]], owed: deque[Job]) -> None:
        jobs = [*owed, *(job for job, _ in new)]
        if not jobs:
            return
        failure: Exception | None = None
        try:
            self._database.write(lambda db: self._write(db, jobs))
            owed.clear()
        except (sqlite3.OperationalError, OSError) as error:
            failure = error
            owed.extend(job for job, urgent in new if not urgent)
        except Exception as error:  # a job that can never be written may not hold up the others for ever
            failure = error
            owed.clear()
        self._settle(jobs, failure)

    def _gather(self, patience: float | None) -> list[tuple[Job | threading.Event | None, bool]]:
        batch: list[tuple[Job | threading.Event | None, bool]] = []
        with suppress(queue.Empty):
            batch.append(self._waiting.get(timeout=patience))
            until = time.monotonic() + _LINGER
            while not batch[-1][1]:
                batch.append(self._waiting.get(timeout=max(0.0, until - time.monotonic())))
        with suppress(queue.Empty):
            while True:
                batch.append(self._waiting.get_nowait())
        return batch
