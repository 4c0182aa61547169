"""Reads what a prompt is about: a log, plain or compressed, a pipe, or the work folder of a Nextflow task.

A stream is read once, in bounded memory. What is not text is refused by its kind; what was read with losses is noted.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from glob import escape
from io import BufferedReader
from pathlib import Path
from typing import cast

from biollm.errors import UsageError, nearest
from biollm.inputs.digest import Digest, scan

BLOCK = 1 << 20

# What Nextflow writes into a task's folder, in the order in which it is read, under Nextflow's own headings.
_WORK = {
    ".command.sh": "Command executed:",
    ".command.trace": "Resources used:",
    ".command.log": "Job log:",
    ".command.out": "Command output:",
    ".command.err": "Command error:",
}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"\xfd7zXZ\0": ("xz", lzma.open),
    b"BZh": ("bzip2", bz2.open),
}
_KINDS = {
    b"BAM\1": "BAM", b"CRAM": "CRAM", b"BCF\2": "BCF", b"BAI\1": "BAM index", b"TBI\1": "tabix index", b"CSI\1": "CSI index",
    b"%PDF": "PDF", b"\x89HDF": "HDF5", b"PK\3\4": "ZIP", b"\x89PNG": "PNG image", b"\xff\xd8\xff": "JPEG image",
    b"GIF8": "GIF image", b"II*\0": "TIFF image", b"MM\0*": "TIFF image", b"\x28\xb5\x2f\xfd": "Zstandard", b"\x7fELF": "program",
    b"RDX": "R data", b"X\n\0": "R data", b"SQLite": "SQLite", b"\x93NUMPY": "NumPy", b"PAR1": "Parquet", b"GGUF": "GGUF",
    b"\x8bPOD": "POD5", b"7z\xbc\xaf": "7z", b"CDF": "NetCDF", b"ARROW1": "Arrow", b"\xd0\xcf\x11\xe0": "Microsoft Office",
}  # fmt: skip
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_TEXT = bytes({7, 8, 9, 10, 12, 13, 27, *range(32, 127), *range(128, 256)})


@dataclass(frozen=True)
class Input:
    """A text that was read: its `digest`, and `notes` on how it was read, a sentence each."""

    name: str
    digest: Digest
    notes: tuple[str, ...] = ()
    empty: bool = False


def read_input(path: Path | int) -> Input:
    """Read a file, a task's work folder, or an open file descriptor, once.

    Raises:
        UsageError: It does not exist, may not be read, is another folder, or is not text.
    """
    try:
        source = _Source(path)
        digest = scan(source.chunks(), source.name)
    except OSError as error:
        raise _unreadable(path, error) from error
    empty = not (digest.head + digest.tail).strip()
    if digest.latin1:
        source.notes.append(f"{source.name} is not all UTF-8; the rest was read as Latin-1.")
    if empty and not source.null and not source.notes:
        source.notes.append(f"{source.name} is empty.")
    return Input(source.name, digest, tuple(source.notes), empty)


def _unreadable(path: Path | int, error: OSError) -> UsageError:
    hint = ""
    if isinstance(path, Path) and isinstance(error, FileNotFoundError) and path.parent.is_dir():
        hint = nearest(path.name, [each.name for each in path.parent.iterdir()])
    return UsageError(
        f"{path if isinstance(path, Path) else _name(path)}: {error.strerror or error}.", hint=hint or None
    )


class _Source:
    """A path or a file descriptor while it is read, with what there is to note."""

    def __init__(self, path: Path | int) -> None:
        self.path = _completed(path) if isinstance(path, Path) else path
        self.name = _name(self.path)
        self.notes: list[str] = []
        self.null = False

    def chunks(self) -> Iterator[bytes]:
        """Yield the text in UTF-8."""
        if not (isinstance(self.path, Path) and self.path.is_dir()):
            yield from self._file(self.path, self.name)
        elif _is_work(self.path):
            yield from self._work(self.path)
        else:
            logs = sorted(each for pattern in (".nextflow.log", "*.log", "*.out") for each in self.path.glob(pattern))
            hint = (
                f"Did you mean {logs[0]}?"
                if len(logs) == 1
                else "Name a file, or a Nextflow task's folder: work/ab/12cd34...."
            )
            raise UsageError(f"{self.path}: Is a directory.", hint=hint)

    def _work(self, folder: Path) -> Iterator[bytes]:
        for name, heading in _WORK.items():
            file = folder / name
            if not file.is_file() or not file.stat().st_size:
                continue
            yield f"{heading}\n".encode()
            try:
                yield from self._file(file, name)
            except UsageError as error:
                self.notes.append(str(error))
            yield b"\n\n"
        status = folder / ".exitcode"
        text = status.read_text(errors="replace").strip() if status.is_file() else ""
        yield f"Command exit status: {text or 'none: the task is running, or was killed with its job'}\n".encode()

    def _file(self, path: Path | int, name: str) -> Iterator[bytes]:
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "rb", closefd=isinstance(path, Path)))
            self.null = os.fstat(file.fileno()).st_rdev == Path(os.devnull).stat().st_rdev
            size = os.fstat(file.fileno()).st_size or None  # a log may grow faster than it is read
            start, packed = file.peek(BLOCK), ""
            for magic, (kind, opened) in _COMPRESSED.items():
                if start.startswith(magic):
                    packed, size = kind, None
                    file = cast(BufferedReader, stack.enter_context(opened(file)))
            blocks = self._blocks(file, name, size, packed)
            yield from self._text(blocks, name, packed)

    def _blocks(self, file: BufferedReader, name: str, size: int | None, packed: str) -> Iterator[bytes]:
        """Yield what a file holds, as far as it can be read."""
        count = 0
        try:
            while size is None or count < size:
                block = file.read1(BLOCK if size is None else min(BLOCK, size - count))
                if not block:
                    return
                count += len(block)
                yield block
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if not packed and not count:
                raise
            reason = f"its {packed} data end early or are damaged" if packed else str(error)
            self.notes.append(f"{name} was read only in part: {reason}.")

    def _text(self, blocks: Iterator[bytes], name: str, packed: str) -> Iterator[bytes]:
        """Yield blocks in UTF-8; refuse what is not text."""
        first = next(blocks, b"")
        encoding = next((each for bom, each in _BOMS.items() if first.startswith(bom)), "") or _utf16(first[: 1 << 16])
        if not encoding:
            first = first.lstrip(b"\0")  # a log that was emptied while it was written begins with many
        if not encoding and (kind := _binary(first[: 1 << 16])):
            kind = kind if not packed or kind in ("BAM", "BCF", "tabix index", "CSI index") else f"{packed} of {kind}"
            raise UsageError(f"{name} is not text ({kind}).", hint="Name a log, or a text that was made of it.")
        if not encoding:
            yield first
            yield from blocks
            return
        decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        if encoding != "utf-8-sig":
            self.notes.append(f"{name} was read as {encoding[:6].upper()}.")
        yield decoder.decode(first).encode()
        for block in blocks:
            yield decoder.decode(block).encode()
        yield decoder.decode(b"", final=True).encode()


def _name(path: Path | int) -> str:
    if isinstance(path, int):
        return "stdin" if path == 0 else f"file descriptor {path}"
    if path.is_dir() and path.parent.name:
        return f"{path.parent.name}/{path.name[:6]}"  # as Nextflow prints it
    return str(path) if path.is_relative_to("/dev") else path.name


def _is_work(folder: Path) -> bool:
    return (folder / ".command.sh").exists() or (folder / ".command.run").exists()


def _completed(path: Path) -> Path:
    """Return the work folder of which `path` is the beginning, as Nextflow prints it (`work/ab/12cd34`), else `path`."""
    if path.exists():
        return path
    folders = [each for each in path.parent.glob(f"{escape(path.name.rstrip('.…'))}*") if _is_work(each)]
    return folders[0] if len(folders) == 1 else path


def _utf16(sample: bytes) -> str:
    """Return the encoding of UTF-16 without a mark, "" if `sample` is another: each second byte of Latin letters is 0."""
    for encoding, zeros, letters in (
        ("utf-16-le", sample[1::2], sample[::2]),
        ("utf-16-be", sample[::2], sample[1::2]),
    ):
        if zeros.count(0) > 0.6 * len(zeros) > 0 and letters.count(0) < 0.02 * len(letters):
            return encoding
    return ""


def _binary(sample: bytes) -> str:
    """Return what kind of binary data begins with `sample`, "" for text."""
    strange = len(sample.translate(None, _TEXT))
    if strange <= 0.02 * len(sample) and not sample.startswith(b"%PDF-"):
        return ""
    if sample[257:262] == b"ustar":
        return "tar"
    return next((kind for magic, kind in _KINDS.items() if sample.startswith(magic)), "binary data")
