"""Prints tables, JSON and progress: facts on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from typer import Option

Json = Annotated[bool, Option("--json", help="Print JSON.")]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; the last one is not padded. Plain text, so that grep and awk can use it."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ  # no-color.org
    for number, row in enumerate(cells):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        print(f"\033[1m{line}\033[0m" if bold and number == 0 else line)


def as_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, default=_plain, indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)  # type: ignore[arg-type]
    if isinstance(value, set | frozenset):
        return sorted(value)  # pyright: ignore
    return value.model_dump() if hasattr(value, "model_dump") else str(value)


def moment(epoch: float | None) -> str | None:
    """Return epoch seconds as ISO 8601 in UTC."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="seconds") if epoch else None


class Progress:
    """Progress on stderr: one line that is replaced on a terminal, else a line each. `hint` is printed at the end."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._live, self._shown, self.hint = quiet, sys.stderr.isatty(), False, ""

    def say(self, text: str) -> None:
        """Show the current step."""
        if self._quiet:
            return
        sys.stderr.write(f"\r\033[K· {text}" if self._live else f"· {text}\n")
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self._live and self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._shown = False

    def note(self, text: str) -> None:
        """Print a line that stays, unless quiet."""
        self.clear()
        if not self._quiet:
            print(text, file=sys.stderr)

    def bytes(self, done: int, total: int) -> None:
        """Show the progress of a download."""
        bar = "█" * int(24 * done / total) if total else ""
        if self._live or done == total:
            self.say(f"[{bar:<24}] {done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB")
