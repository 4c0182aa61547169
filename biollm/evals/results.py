"""The file of a comparison's results: JSONL, from which an interrupted run resumes, and which Inspect reads."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from biollm._files import locked
from biollm.errors import UsageError
from biollm.types import Json


@dataclass(frozen=True)
class Results:
    """What earlier runs found, by key, and the file to which this run adds; None keeps nothing."""

    known: dict[str, Json] = field(default_factory=dict[str, Json])
    file: FileIO | None = None

    def add(self, key: str, line: Json) -> None:
        """Write a result at once: it is paid for."""
        if self.file:
            text = json.dumps({"key": key, **line}, ensure_ascii=False) + "\n"
            try:
                self.file.write(text.encode(errors="backslashreplace"))  # half a surrogate pair, as JSON writes it
            except OSError as error:
                error.filename = self.file.name
                raise


@contextmanager
def opened(path: Path | None) -> Generator[Results]:
    """Open the file (0600) for one run alone.

    Raises:
        UsageError: It cannot be written, another run uses it, or it holds something else.
    """
    if path in (None, Path(os.devnull)):
        yield Results()
        return
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", hint="Name another file with -o.") from None
    lock = locked(path.resolve(), wait=False) if path.is_file() else nullcontext(True)  # a pipe takes none
    with lock as alone, path.open("ab", buffering=0) as file:
        if not alone:
            hint = "Wait until that ends, or name another file with -o."
            raise UsageError(f"{path} is in use by another comparison.", hint=hint)
        text = path.read_text(errors="replace") if path.is_file() else ""
        known = dict[str, Json]()
        for line in text.split("\n"):
            with suppress(ValueError, KeyError, TypeError):
                record: Json = json.loads(line)
                known[record["key"]] = record
        if text and not known:
            raise UsageError(f"{path} holds no results of a comparison.", hint="Name another file with -o.")
        if text and not text.endswith("\n"):
            file.write(b"\n")  # an interrupted run left a part of a line
        yield Results(known, file)
