"""Reads what a prompt is about: a log, plain or compressed, a pipe, or a Nextflow work folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from biollm.errors import UsageError
from biollm.inputs.digest import Digest, scan

BLOCK = 1 << 20


@dataclass(frozen=True)
class Input:
    """A text that was read: its `name`, its `digest`, and `notes` on how it was read, a sentence each."""

    name: str
    digest: Digest
    notes: tuple[str, ...] = ()
    empty: bool = False


def read_input(path: Path | int) -> Input:
    """Read a file, a pipe or an open file descriptor once, in bounded memory."""
    name = path.name if isinstance(path, Path) else "stdin"
    seen = 0

    def blocks() -> Iterator[bytes]:
        nonlocal seen
        with open(path, "rb", closefd=isinstance(path, Path)) as file:
            while block := file.read(BLOCK):
                seen += len(block)
                yield block

    try:
        digest = scan(blocks(), name)
    except OSError as error:
        raise UsageError(f"{path if isinstance(path, Path) else name}: {error.strerror}.") from error
    return Input(name, digest, (f"{name} is empty.",) if not seen else (), not seen)
