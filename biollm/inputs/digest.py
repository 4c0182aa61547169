"""Keeps what could matter of a text that is read once: its beginning, its end, and the surroundings of its finds.

What is kept is bounded, and more than the largest context can hold. `cut` then fits it to one deployment's context.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from biollm.inputs.excerpt import Excerpt, Kept, excerpt, marks
from biollm.inputs.finds import CAUSE, FAILURE, LONG, MENTION, STATUS, finds, has_finds, shape, shorten
from biollm.inputs.tokens import estimate

HEAD, TAIL = 1_500_000, 4_500_000  # characters that are kept of the beginning and the end
WINDOW = 1 << 14  # bytes that are searched at once
LONGEST = 3_000_000  # bytes after which a line is broken
BEFORE, AFTER, SURROUNDINGS = 8, 40, 8_000  # lines around a find that are kept, and at most so many characters
SHAPES = 100  # finds of one weight that are kept: the first, and as many of the last; each once more at its last place
PER_WINDOW = 12  # finds of a window that are considered, causes and others, and a quarter of it from its end

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_]|[()][0-9A-B])")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes as surrogateescape decodes them


@dataclass(frozen=True)
class Digest:
    """What is kept of a text: all of it where `complete`. `latin1`: some of its bytes were not UTF-8 and were read as Latin-1."""

    name: str
    lines: int
    head: str
    tail: str
    found: tuple[Kept, ...] = ()
    marked: Mapping[int, int] = field(default_factory=dict[int, int])
    complete: bool = True
    latin1: bool = False

    def cut(self, tokens: int) -> Excerpt:
        """Return the excerpt that fits into about `tokens`: the whole text where it does."""
        first, last = self.head, self.tail
        if self.complete:
            first = last = self.head + self.tail
            if (size := estimate(first)) <= tokens:
                return Excerpt(first, self.lines + sum(self.marked.values()), self.lines, size, whole=True)
        most = max(2_000, tokens // 3)  # lines: each is a few tokens
        head = _lines(first[: first.find("\n", max(1 << 16, 3 * tokens)) + 1 or None])[:most]
        tail = _lines(last[last.rfind("\n", 0, max(0, len(last) - max(1 << 16, 5 * tokens))) + 1 :])[-most:]
        ends = Kept(0, tuple(head)), Kept(self.lines - len(tail), tuple(tail))
        return excerpt(ends, self.found, self.lines, self.marked, tokens)


def scan(chunks: Iterable[bytes], name: str) -> Digest:
    """Read a stream once, in bounded memory, and keep what could matter."""
    scanner = _Scanner()
    for window in _windows(chunks):
        scanner.add(window)
    return scanner.digest(name)


def _lines(text: str) -> list[str]:
    """Return the lines of `text` without their line feeds; no other character ends a line."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _plain(text: str) -> str:
    """Return `text` without the escape sequences of a terminal."""
    return _ANSI.sub("", text) if "\x1b" in text else text


def _latin1(found: re.Match[str]) -> str:
    byte = ord(found[0]) - 0xDC00
    return chr(byte) if byte >= 0xA0 else "\ufffd"


def _windows(chunks: Iterable[bytes]) -> Iterator[bytearray]:
    """Yield a stream in windows of whole lines."""
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > WINDOW and (end := _window_end(rest, start)):
            yield rest[start:end]
            start = end
        if len(rest) - start > LONGEST:
            start = rest.rfind(b" ") + 1 or len(rest)
            yield rest[:start] + b"\n"
        del rest[:start]
    if rest:
        yield rest


def _window_end(data: bytearray, start: int) -> int:
    """Return where the last line ends that fits into a window, else where the first line ends; 0 if it is not known."""
    limit = start + WINDOW
    if end := data.rfind(b"\n", start, limit) + 1:
        return end
    end = data.rfind(b"\r", start, limit) + 1
    if not end:
        end = min((at for mark in b"\n\r" if (at := data.find(mark, limit) + 1)), default=0)
    return 0 if end == len(data) else end + data.startswith(b"\r\n", end - 1)


class _Scanner:
    """What is kept while a stream is read, a window at a time."""

    def __init__(self) -> None:
        self._latin1 = False
        self._complete = True
        self._head: list[str] = []
        self._tail: deque[str] = deque()
        self._head_size = self._tail_size = self._lines = self._start = 0
        self._found = {weight: _Found() for weight in (CAUSE, STATUS, FAILURE, MENTION)}
        self._marked: dict[int, int] = {}
        self._preceding = self._window = ""

    def add(self, data: bytearray) -> None:
        """Keep a window of whole lines, and search the one before it, whose surroundings are now known."""
        window = self._text(data)
        self._search(window)
        if self._head_size < HEAD and not self._tail:
            self._head.append(window)
            self._head_size += len(window)
        else:
            self._tail.append(window)
            self._tail_size += len(window)
            while self._tail_size - len(self._tail[0]) >= TAIL:
                self._tail_size -= len(self._tail.popleft())
                self._complete = False
        self._preceding, self._window, self._start = self._window, window, self._lines
        self._marked |= marks(window, self._lines)
        self._lines += window.count("\n")

    def _text(self, data: bytearray) -> str:
        """Return the text; a carriage return ends a line."""
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\0" in data:  # a log that was emptied while it was written begins with many
            data = data.replace(b"\0", b"")
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._latin1 = True
            return _NOT_UTF8.sub(_latin1, data.decode(errors="surrogateescape"))

    def _search(self, following: str) -> None:
        if not has_finds(self._window):
            return
        before = _lines(_plain(self._preceding[-SURROUNDINGS:]))[-BEFORE:]
        lines = _lines(_plain(self._window))
        around = [*before, *lines, *_lines(_plain(following[:SURROUNDINGS]))[:AFTER]]
        places: dict[tuple[int, bytes], tuple[int, int]] = {}
        for index, weight in finds(lines, PER_WINDOW):
            key = weight, shape(lines[index])
            places[key] = places.get(key, (index, index))[0], index
        for (weight, key), (one, other) in places.items():
            for index in (one, other)[: 1 + (other > one)]:
                at = index + len(before)
                first, texts = max(0, at - BEFORE), around[max(0, at - BEFORE) : at + AFTER]
                if sum(map(len, texts)) > SURROUNDINGS:
                    first, texts = max(0, at - 1), [shorten(line, LONG) for line in around[max(0, at - 1) : at + 4]]
                kept = Kept(self._start + first - len(before), tuple(texts), at - first, weight)
                self._found[weight].add(key, kept)

    def digest(self, name: str) -> Digest:
        """Return what was kept, at the end of the stream."""
        self._search("")
        tail = _plain("".join(self._tail))
        last = (self._tail or self._head or [""])[-1]
        return Digest(
            name,
            self._lines + (bool(last) and not last.endswith("\n")),
            _plain("".join(self._head)),
            tail,
            tuple(sorted(kept for found in self._found.values() for kept in found.all())),
            self._marked,
            self._complete,
            self._latin1,
        )


class _Found:
    """The finds of one weight: the first `SHAPES` and the last, each at its first place and its last."""

    def __init__(self) -> None:
        self._first: dict[bytes, list[Kept]] = {}
        self._last: OrderedDict[bytes, list[Kept]] = OrderedDict()

    def add(self, key: bytes, kept: Kept) -> None:
        places = self._first if key in self._first or len(self._first) < SHAPES else self._last
        places[key] = [*places.get(key, ())[:1], kept]
        if places is self._last:
            self._last.move_to_end(key)
            if len(self._last) > SHAPES:
                self._last.popitem(last=False)

    def all(self) -> Iterator[Kept]:
        for places in (self._first, self._last):
            for kept in places.values():
                yield from kept
