"""Reads what `complete` and `explain` take: a question, files, and piped input."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from biollm.errors import UsageError

if TYPE_CHECKING:
    from biollm.inputs.digest import Digest

_PROMPT = 8_000  # tokens up to which piped text without a question is the prompt itself, and never cut
_STDIN = Path("-")


def read(prompt: str | None, files: Sequence[Path]) -> tuple[str, list[Digest]]:
    """Return the question, and the files and piped input that it is about; `-` is stdin. Notes go to stderr.

    Raises:
        UsageError: A file cannot be read.
    """
    from biollm.inputs.read import read_input

    question = "" if prompt in (None, "-") else prompt or ""
    places: list[Path | int] = [file for file in files if file != _STDIN]
    if prompt == "-" or _STDIN in files or _is_piped():
        places.append(0)
    found: list[Digest] = []
    for each in map(read_input, places):
        for note in each.notes:
            print(note, file=sys.stderr)
        if not each.empty:
            found.append(each.digest)
    if not question.strip() and len(found) == 1 and not files and (short := found[0].cut(_PROMPT)).whole:
        return short.text, []
    return question, found


def needs(question: str, found: Sequence[Digest]) -> None:
    """Refuse an empty prompt.

    Raises:
        UsageError: There is neither a question nor a text.
    """
    if not question.strip() and not found:
        raise UsageError(
            "The prompt is empty.", hint='Pass one, as in biollm complete "Why?", add -f FILE, or pipe text in.'
        )


def _is_piped() -> bool:
    """Return whether stdin is a pipe or a file; terminals, sockets and /dev/null are read only for `-`."""
    mode = 0
    with suppress(OSError):  # it may be closed
        mode = os.fstat(0).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
