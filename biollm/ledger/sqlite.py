"""SQLite files that many processes write to, on local disks and on network file systems.

SQLite has no queue in front of its lock (waiters sleep up to 100 ms at a time and starve each other), its WAL does
not work on network file systems, it leaves a damaged file to the user, and after a fork the child takes its parent's
locks for its own: a fork therefore waits until no file is in use, and closes them.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import re
import socket
import sqlite3
import struct
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from biollm._files import create

_log = logging.getLogger("biollm")

BOUND = 0.25  # seconds that a caller waits for a file
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

Prepare = Callable[[sqlite3.Connection], None]

_NETWORK = re.compile(
    r"nfs\d?|lustre|gpfs|beegfs\w*|cifs|smb\d?|ceph|glusterfs|afs|9p|pvfs2|orangefs|panfs|wekafs|virtiofs"
    r"|fuse\.(sshfs|ceph.*|glusterfs|gpfs|juicefs|s3fs|rclone|gcsfuse)"
)


_LOCAL_LOCKS = re.compile(r"fuse\.(sshfs|s3fs|rclone|gcsfuse)")  # types of mounts that pass no locks to other hosts
_LOCAL_LOCKS_BY = {"nolock", "local_lock=all", "local_lock=posix", "localflock", "nobrl"}  # options of NFS, Lustre, SMB
_MOUNTS = Path("/proc/self/mounts")


def _mount(folder: Path, mounts: Path) -> tuple[str, set[str]]:
    """Return the type and the options of the mount that `folder` lies on; "" where that is not known."""
    where = folder.resolve()
    depth, found = -1, ("", set[str]())
    with suppress(OSError):
        for line in mounts.read_text(errors="replace").splitlines():
            point, fstype, options = line.split()[1:4]
            path = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point))
            if where.is_relative_to(path) and len(path.parts) >= depth:  # a later mount hides an earlier one
                depth, found = len(path.parts), (fstype, set(options.split(",")))
    return found


def on_network(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Return whether `folder` lies on a network file system, by the type of its mount."""
    return bool(_NETWORK.fullmatch(_mount(folder, mounts)[0]))


def locks_are_local(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Return whether `folder` lies on a network file system whose locks hold between processes of one host only."""
    kind, options = _mount(folder, mounts)
    return bool(_LOCAL_LOCKS.fullmatch(kind)) or (bool(_NETWORK.fullmatch(kind)) and bool(options & _LOCAL_LOCKS_BY))


def databases(state: Path) -> Path:
    """Return where a state folder's databases lie: in it, or in one folder per host where locks do not reach others.

    Two hosts that write to one file without a common lock damage it.
    """
    return state / "hosts" / socket.gethostname() if locks_are_local(state) else state


def read(
    path: Path, sql: str, arguments: Sequence[object] = (), *, patience: float = BOUND, prepare: Prepare | None = None
) -> list[Any]:
    """Return the rows of one query on a new connection, which `prepare` may set up.

    None while the file or its table does not exist; sqlite3.Error if it cannot be read within `patience` seconds.
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


@contextmanager
def reading(path: Path, patience: float) -> Generator[sqlite3.Connection]:
    """Open an existing file for reading; each query waits at most `patience` seconds."""
    # "rw" creates no file and falls back to reading; "ro" could not roll back what a killed writer left behind.
    url = f"{path.absolute().as_uri()}?mode=rw"
    with _in_use(), closing(sqlite3.connect(url, uri=True, timeout=patience)) as db:
        yield db


_lock = threading.Condition()  # of the three below; held during a fork
_databases: WeakSet[Database] = WeakSet()
_uses: dict[object, int] = {}  # each use of a file at the moment, and its thread
_forking: set[int] = set()  # threads that are about to fork
_FORK = 2.0  # seconds for which a fork waits for other threads' uses, and new uses for a fork


@contextmanager
def _in_use() -> Generator[None]:
    use, thread = object(), threading.get_ident()
    with _lock:
        _lock.wait_for(lambda: _forking <= {thread} or thread in _uses.values(), _FORK)
        _uses[use] = thread
    try:
        yield
    finally:
        with _lock:
            _uses.pop(use, None)  # one that began before a fork is not in the child's
            _lock.notify_all()


def _before_fork() -> None:
    thread = threading.get_ident()
    _lock.acquire()
    _forking.add(thread)
    if _lock.wait_for(lambda: set(_uses.values()) <= {thread}, _FORK) and not _uses:
        for each in _databases:
            each.close()


def _after_fork() -> None:
    _forking.discard(threading.get_ident())
    _lock.notify_all()
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Condition()
    _uses.clear()
    _forking.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def is_damage(error: Exception) -> bool:
    """Return whether the error means that a file is damaged; the next write sets such a file aside."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


class Database:
    """One SQLite file for one writing thread; opened on first use, and again when the file is replaced.

    WAL on local disks, a rollback journal on network file systems. In both cases writers queue, within one process
    too, for a blocking lock on a file beside it. Files are 0600; in a folder with the setgid bit, which a group
    shares, 0660. A file that `shrinks` gives the room of deleted rows back.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        network: bool,
        synchronous: str,
        patience: float,
        migrate: Prepare | None = None,
        *,
        shrinks: bool = False,
    ) -> None:
        self.path, self._schema, self._patience, self._migrate = path, schema, patience, migrate
        vacuum = ("auto_vacuum=FULL",) if shrinks else ()  # before the journal mode, which fills the first page
        self._pragmas = (*vacuum, f"journal_mode={'PERSIST' if network else 'WAL'}", f"synchronous={synchronous}")
        self._db: sqlite3.Connection | None = None
        self._inode = self._lock = -1
        with _lock:
            _databases.add(self)

    def write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Run `work` in one transaction. A damaged file is set aside, and `work` runs on a new one.

        Raises sqlite3.Error if the file is locked for `patience` seconds or not writable; OSError for the folder.
        """
        with _in_use():
            try:
                try:
                    self._write(work)
                except sqlite3.DatabaseError as error:
                    if not is_damage(error):
                        raise
                    self._set_aside(error)
                    self._write(work)
            except BaseException:
                self.close()  # the next try starts from the folder up
                raise

    def close(self) -> None:
        """Close the file and its lock; `write` opens them again."""
        with _in_use():
            self._disconnect()
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        with self._locked(), self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            work(db)

    @contextmanager
    def _locked(self) -> Generator[None]:
        if self._lock < 0:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock")
            create(lock)
            self._lock = os.open(lock, os.O_RDWR)
        _set_lock(self._lock, fcntl.F_WRLCK)
        try:
            yield
        finally:
            _set_lock(self._lock, fcntl.F_UNLCK)

    def _connection(self) -> sqlite3.Connection:
        if self._db and self._inode == _inode(self.path):
            return self._db
        self._disconnect()
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

    def _disconnect(self) -> None:
        if self._db:
            self._db.close()
            self._db = None

    def _set_aside(self, error: Exception) -> None:
        self._disconnect()
        with self._locked():
            if self._inode != _inode(self.path):
                return  # another process has done it
            aside = next(name for n in itertools.count(1) if not (name := Path(f"{self.path}.corrupt-{n}")).exists())
            for suffix in ("-wal", "-shm", "-journal", ""):
                with suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        _log.warning("%s is damaged (%s): kept as %s; a new file is used.", self.path, error, aside.name)


def _set_lock(file: int, kind: int) -> None:
    """Take or release a lock of the open file, not of the process as `lockf` does: it excludes threads too, and a
    process that waits for two files in two threads is not mistaken for a deadlock."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi0q", kind, os.SEEK_SET, 0, 0, 0))  # struct flock


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1
