"""Writes files atomically, private ones and the user's, and locks them between processes."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from biollm.errors import UsageError


def is_shared(folder: Path) -> bool:
    """Return whether a group shares the folder: it can write there, and new files are the group's (setgid)."""
    try:
        mode = folder.stat().st_mode
    except OSError:
        return False
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def private_folder(path: Path) -> Path:
    """Make the folder and its parents (0700) where they are missing, and return it."""
    if not path.is_dir():
        private_folder(path.parent)  # mkdir(parents=True) would leave the parents to the umask
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def common_folder(path: Path) -> Path:
    """Make the folder and return it: the group's if a group shares its parent, else private."""
    if not path.is_dir() and is_shared(private_folder(path).parent):
        path.chmod(0o2770)
    return path


def write_private(path: Path, text: str) -> None:
    """Replace the file `path` (0600) atomically: readers see the old text or the new."""
    private_folder(path.parent)
    _replace(path, text, 0o600)


def write_readable(path: Path, text: str) -> None:
    """Replace a file of a private folder that others read (0644) atomically."""
    _replace(path, text, 0o644, 0o644)


def write_for_user(path: Path, text: str) -> None:
    """Replace a user's file atomically, keeping its mode and links to it; write to what is no file (/dev/stdout).

    Raises:
        UsageError: Its folder does not exist.
    """
    path = path.resolve()
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}.")
    if path.exists() and not path.is_file():
        path.write_text(text)
    else:
        _replace(path, text, 0o666, path.stat().st_mode & 0o7777 if path.exists() else None)


def _replace(path: Path, text: str, new: int, keep: int | None = None) -> None:
    """Rename a file with `text` to `path`, once it is on disk. Its mode is `keep`, else `new` less the umask."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, new), "w") as file:
            if keep is not None:
                os.fchmod(file.fileno(), keep)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave the new name with no text
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # a file system that cannot
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def create(path: Path) -> None:
    """Make an empty file, 0660 in a group's folder, else 0600, unless it exists.

    An existing database is not opened: closing it would drop the locks that SQLite holds in this process.
    """
    mode = 0o660 if is_shared(path.parent) else 0o600
    with suppress(FileExistsError):
        made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        os.fchmod(made, mode)
        os.close(made)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold the lock file `path`, and yield whether it is held: others wait for it, or get False where `wait` is False.

    A process that dies loses it. Where the file system has no locks, all hold it.
    """
    private_folder(path.parent)
    create(path)
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:  # NFS without a lock daemon
            pass
        yield held
        if held:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def file_time(folder: Path) -> float:
    """Return the time of the file server's clock; this host's where `folder` is not writable."""
    mark = folder / f".clock-{os.getuid()}"
    try:
        mark.touch(mode=0o600)
        return mark.stat().st_mtime
    except OSError:
        return time.time()
