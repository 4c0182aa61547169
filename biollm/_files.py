"""Files that only their owner may read: written whole or not at all, guarded by a lock between processes."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


def private_folder(path: Path) -> Path:
    """Make the folder and its parents (0700) where they are missing, and return it."""
    if not path.is_dir():
        private_folder(path.parent)  # mkdir(parents=True) would leave the parents to the umask
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def write_private(path: Path, text: str) -> None:
    """Put `text` in the file `path` (0600) by renaming: readers see the old text or the new, whole."""
    handle, name = tempfile.mkstemp(dir=private_folder(path.parent), prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold the lock file `path`; others wait. Where a file system has no locks, nobody does."""
    private_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):  # NFS without a lock daemon
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
