"""Prints tables, JSON and progress: facts on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from typer import CallbackParam, Option

from biollm.config.paths import data_dir
from biollm.errors import UsageError

_LAST, _LEAST = 18, 10  # columns of a terminal that the last column, and each of the others, keeps
# Green for what may be used, yellow for what will be, red for what needs a hand, faint for what is not set up.
STATES = {
    **dict.fromkeys(("ready", "training", "up", "ok", "answered"), 32),
    **dict.fromkeys(("limited", "cooling", "pending", "starting", "unknown"), 33),
    **dict.fromkeys(("refused", "down", "failed", "FAILED", "FAIL"), 31),
    **dict.fromkeys(("keyless", "absent", "unfit", "skipped"), 2),
}
Json = Annotated[bool, Option("--json", help="Print JSON.")]


class _Tolerant(io.TextIOWrapper):
    """A stderr whose failures are no failures of the command: it may be full, or its reader have left."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            return super().write(text)
        return 0

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def open_streams() -> bool:
    """Open /dev/null for each standard stream that is closed, so that no file takes its place.

    Returns:
        Whether stdout is open.
    """
    closed: list[int] = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.append(os.open(os.devnull, os.O_RDWR))
    if isinstance(sys.stderr, io.TextIOWrapper) or sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        raw = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115 # for the rest of the process
        sys.stderr = _Tolerant(raw, "utf-8", "backslashreplace", write_through=True)
    return 1 not in closed


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns: at a terminal within its width and with colours, else plain lines for grep and awk.

    Where the columns are wider than the terminal, cells are wrapped between words, and longer words cut in their middle.
    """
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    wide = width()
    live = wide < math.inf
    if live:
        widths = _narrowed(widths, wide)
    color = live and "NO_COLOR" not in os.environ  # no-color.org
    for number, row in enumerate(cells):
        wrapped = [_wrapped(cell, width) if live else [cell] for cell, width in zip(row, widths, strict=True)]
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            padded = [part.ljust(width) for part, width in zip(parts[:-1], widths[:-1], strict=True)]
            if color and number:
                padded = [painted(cell) for cell in padded]
            line = "  ".join([*padded, parts[-1]]).rstrip()
            print(f"\033[1m{line}\033[0m" if color and number == 0 else line)


def paragraph(text: str, indent: int = 0) -> None:
    """Print a sentence; at a terminal, in lines that end between words, those after the first indented."""
    if width() < math.inf:
        text = textwrap.fill(
            text, int(width()), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
    print(text)


def width() -> float:
    """Return the columns of the terminal; without one there is no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf


def _narrowed(widths: Sequence[int], wide: float) -> list[int]:
    """Return widths that fit together into `wide` columns: the last one gives first, then the widest of the others."""
    found, gaps = list(widths), 2 * (len(widths) - 1)
    found[-1] = min(found[-1], max(_LAST, int(wide) - gaps - sum(found[:-1])))
    while sum(found) + gaps > wide and max(found[:-1], default=0) > _LEAST:
        found[found.index(max(found[:-1]))] -= 1
    return found


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [cut(line, width) for line in lines] or [""]


def cut(text: str, width: int) -> str:
    """Return a text of at most `width` letters, cut in its middle."""
    if len(text) <= width:
        return text
    left = (width - 1) // 2
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"


def short_path(text: str) -> str:
    """Return a text with ~ for the home folder, and without the folder of the shipped configuration."""
    home, shipped = str(Path.home()), str(data_dir("router_config"))
    return text.replace(f"{shipped}/", "shipped ").replace(f"{home}/", "~/")


def warn_unwritable(state: Path) -> None:
    """Say on stderr that what is shown is not all, where the ledger in the state folder cannot be written."""
    from biollm.ledger.sqlite import databases

    state = databases(state)
    place = next(each for each in (state, *state.parents) if each.exists())  # in which it would be made
    files = [place, *(file for name in ("quotas.db", "history.db") if (file := state / name).exists())]
    full = os.statvfs(place).f_bavail == 0
    if full or not place.is_dir() or not all(os.access(file, os.W_OK) for file in files):
        why = "is on a full disk" if full else "cannot be written"
        print(f"{short_path(str(state))} {why}: requests since then are missing here.", file=sys.stderr)


def painted(cell: str) -> str:
    """Return the name of a state in its colour; anything else as it is."""
    hue = STATES.get(cell.strip())
    return f"\033[{hue}m{cell}\033[0m" if hue else cell


def filled(option: CallbackParam, value: Any) -> Any:
    """Return the value of an option, the callback of one that must not be empty; raise UsageError where it is."""
    if not all(each.strip() for each in ([value] if isinstance(value, str) else value or ())):
        raise UsageError(f"{option.opts[0]} is empty.", hint="Give a value, or leave the option out.")
    return value


def as_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, default=_plain, indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)  # type: ignore[arg-type]
    if isinstance(value, set | frozenset):
        return sorted(value)  # pyright: ignore
    return value.model_dump() if hasattr(value, "model_dump") else str(value)


class Progress:
    """Progress on stderr: one line that is replaced on a terminal, else a line each. `hint` is printed at the end."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._live, self._shown, self.hint = quiet, sys.stderr.isatty(), "", ""
        self._began, self._lock, self._ticking = 0.0, threading.Lock(), False

    def say(self, text: str) -> None:
        """Show the current step; on a terminal with the seconds that it takes."""
        if self._quiet:
            return
        with self._lock:
            self._shown, self._began = text, time.monotonic()
            self._write(f"\r\033[K· {text}" if self._live else f"· {text}\n")
        if self._live and not self._ticking:
            self._ticking = True
            threading.Thread(target=self._tick, daemon=True).start()

    def clear(self) -> None:
        """Remove the line."""
        with self._lock:
            if self._live and self._shown:
                self._write("\r\033[K")
            self._shown = ""

    def _tick(self) -> None:
        for spoke in itertools.cycle("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"):
            time.sleep(0.2)
            with self._lock:
                if self._shown and (seconds := time.monotonic() - self._began) >= 1:
                    self._write(f"\r\033[K{spoke} {self._shown}  {seconds:.0f} s")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def note(self, text: str) -> None:
        """Print a line that stays, unless quiet; the current step goes on below it."""
        if not self._quiet:
            with self._lock:
                live = self._live and self._shown
                self._write(f"\r\033[K{text}\n· {self._shown}" if live else f"{text}\n")

    def bytes(self, done: int, total: int) -> None:
        """Show the progress of a download."""
        bar = "█" * int(24 * done / total) if total else ""
        if self._live or done == total:
            self.say(f"[{bar:<24}] {done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB")
