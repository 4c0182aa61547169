"""Keeps what could matter of a text that is read once, and cuts it to what fits a context."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from biollm.inputs.tokens import estimate

KEPT = 8_000_000  # bytes of a stream that a digest keeps, half from each end
_FINDS = re.compile(
    r"(?i)error|exception|failed|fatal|killed|denied|no such|not found|caused by|traceback|no space|exit"
)
_ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


@dataclass(frozen=True)
class Excerpt:
    """What of a text fits: `kept` of its `lines`, at about `tokens`; `whole` where nothing was left out."""

    text: str
    lines: int
    kept: int
    tokens: int
    whole: bool


@dataclass(frozen=True)
class Digest:
    """What could matter of a text that was read once."""

    name: str
    head: bytes
    tail: bytes
    between: int

    def cut(self, tokens: int) -> Excerpt:
        """Return the excerpt that fits into about `tokens`."""
        lines = (self.head + self.tail).decode(errors="replace").splitlines(keepends=True)
        total, text = len(lines) + self.between, "".join(lines)
        if not self.between and estimate(text) <= tokens:
            return Excerpt(text, total, total, estimate(text), True)
        count = len(lines)
        finds = [number for number, line in enumerate(lines) if _FINDS.search(line)]
        near = [at for number in finds for at in (number, number + 1, number - 1) if 0 <= at < count]
        ends = [at for k in range(count) for at in (count - 1 - k, k)]
        chosen: set[int] = set()
        for at in dict.fromkeys([*ends[:8], *near, *ends]):
            if estimate(_render(lines, chosen | {at}, self.between)) > tokens:
                break
            chosen.add(at)
        text = _render(lines, chosen, self.between)
        return Excerpt(text, total, len(chosen), estimate(text), False)


def _render(lines: list[str], chosen: set[int], between: int) -> str:
    parts: list[str] = []
    last = -1
    for at in [*sorted(chosen), len(lines)]:
        if left := at - last - 1:
            parts.append(f"[... {left + between:,} lines left out ...]\n")
            between = 0
        parts += lines[at : at + 1]
        last = at
    return "".join(parts)


def scan(chunks: Iterable[bytes], name: str) -> Digest:
    """Read a stream once and keep what could matter, in bounded memory."""
    data = b"".join(chunks)
    data = _ANSI.sub(b"", data).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if len(data) <= KEPT:
        return Digest(name, data, b"", 0)
    head, tail = data[: data.rindex(b"\n", 0, KEPT // 2) + 1], data[data.index(b"\n", len(data) - KEPT // 2) + 1 :]
    return Digest(name, head, tail, data.count(b"\n", len(head), len(data) - len(tail)))
