"""Chooses the lines of a text that fit a number of tokens; pure.

Each line has a score: that of a find by its weight, where the first and the last finds count more than those between;
that of its neighbours, less the farther they are; and those of its distance from the end and from the beginning. The
lines of the highest scores are shown in the order of the text, as many as fit.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from biollm.inputs.finds import CAUSE, FAILURE, LONG, MENTION, STATUS, shape, shorten
from biollm.inputs.tokens import estimate

_MARKS = re.compile(
    r"^\[\.\.\. ([\d,]{1,20}) (?:lines? left out|more lines like the one above) \.\.\.\]$", re.MULTILINE
)
_REPEATED = " more lines like the one above ...]"
_SCORE = {CAUSE: 1000.0, STATUS: 450.0, FAILURE: 330.0, MENTION: 60.0}
_END, _BEGINNING = 400.0, 150.0
_FOLDED = 4  # lines in a row that differ only in numbers, from which on they are folded


@dataclass(frozen=True)
class Excerpt:
    """What of a text fits: `kept` of its `lines`, about `tokens`; `whole` where nothing was left out."""

    text: str
    lines: int
    kept: int
    tokens: int
    whole: bool


@dataclass(frozen=True, order=True)
class Kept:
    """Lines of a text from number `start` on (from 0). The one at index `find` is a find, if `weight` is not 0."""

    start: int
    texts: tuple[str, ...]
    find: int = 0
    weight: int = 0


@dataclass(slots=True)
class _Entry:
    """A line, or a mark in place of several: `start` and `end` count the lines of the text as it once was."""

    text: str
    start: int
    end: int
    weight: int = 0
    mark: bool = False
    score: float = 0.0


def marks(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Yield the marks of an earlier condensing: the number of the line, and how many more than itself it stands for."""
    for mark in _MARKS.finditer(text) if "[... " in text else ():
        yield start + text.count("\n", 0, mark.start()), int(mark[1].replace(",", "") or 1) - 1


def excerpt(ends: Iterable[Kept], found: Sequence[Kept], lines: int, marked: Mapping[int, int], tokens: int) -> Excerpt:
    """Return what fits of a text.

    Args:
        ends: Its beginning and its end.
        found: Its finds.
        lines: How many lines it has.
        marked: Its marks of an earlier condensing.
        tokens: What fits.
    """
    texts = {each.start + index: text for each in (*found, *ends) for index, text in enumerate(each.texts)}
    weights = {each.start + each.find: each.weight for each in found}
    entries = _folded(list(_entries(texts, weights, marked, max(240, min(LONG, tokens // 2)))))
    total = lines + sum(marked.values())
    _score(entries)
    ranked = sorted((at for at, entry in enumerate(entries) if entry.score), key=lambda at: (-entries[at].score, at))

    def fits(chosen: list[int]) -> bool:
        return estimate(_render(entries, chosen, total)) <= tokens

    few, many = 0, min(len(ranked), tokens)
    while few < many:
        middle = (few + many + 1) // 2
        few, many = (middle, many) if fits(ranked[:middle]) else (few, middle - 1)
    chosen = ranked[:few]
    for at in ranked[few + 1 : few + 20] if tokens < 2000 else ():  # shorter ones, where the next one did not fit
        if fits([*chosen, at]):
            chosen.append(at)
    text = _render(entries, chosen, total) if fits(chosen) else ""  # not even the mark fits
    shown = sum(not entries[at].mark for at in chosen)
    return Excerpt(text, total, shown, estimate(text), whole=False)


def _entries(
    texts: Mapping[int, str], weights: Mapping[int, int], marked: Mapping[int, int], width: int
) -> Iterator[_Entry]:
    """Yield the lines in order, with their places in the text as it was before an earlier condensing."""
    more, waiting = 0, deque(sorted(marked))
    for number in sorted(texts):
        while waiting and waiting[0] < number:
            more += marked[waiting.popleft()]
        text, start = shorten(texts[number], width), number + more
        end = start + 1 + marked.get(number, 0)
        yield _Entry(text, start, end, weights.get(number, 0), mark=number in marked)


def _folded(entries: list[_Entry]) -> list[_Entry]:
    """Return the entries with runs of lines that differ only in numbers folded to the first, a mark and the last."""
    folded: list[_Entry] = []
    shapes = [b"" if entry.mark else shape(entry.text) for entry in entries]
    at = 0
    while at < len(entries):
        first, end = entries[at], at + 1
        while end < len(entries) and _alike(entries, shapes, at, end):
            end += 1
        if end - at >= _FOLDED:
            last = entries[end - 1]
            folded += [first, _repeated(first.end, last.start), last]
            at = end
        else:
            folded.append(first)
            at += 1
    return folded


def _alike(entries: list[_Entry], shapes: list[bytes], first: int, other: int) -> bool:
    one, two = entries[first], entries[other]
    if entries[other - 1].end != two.start or one.mark:
        return False
    if two.mark:
        return two.text.endswith(_REPEATED)
    return one.text == two.text or (
        shapes[first] == shapes[other] and max(one.weight, two.weight) < STATUS and bool(one.text) == bool(two.text)
    )


def _repeated(start: int, end: int) -> _Entry:
    return _Entry(f"[... {end - start:,}{_REPEATED}", start, end, mark=True)


def _score(entries: list[_Entry]) -> None:
    count = len(entries)
    for k, entry in enumerate(entries):
        entry.score = max(_BEGINNING / (1 + k / 3), _END / (1 + (count - 1 - k) / 6))
    finds = [at for at, entry in enumerate(entries) if entry.weight]
    for weight in _SCORE:
        of_weight = [at for at in finds if entries[at].weight == weight]
        first = {shape(entries[at].text): at for at in reversed(of_weight)}
        new = sorted(first.values())
        for place, at in enumerate(new):
            _raise(entries, at, _SCORE[weight] / (1 + 0.15 * min(place, len(new) - 1 - place)))
    for at, entry in enumerate(entries):
        if entry.mark:
            entry.score = entries[at - 1].score * 0.99 if at and entry.text.endswith(_REPEATED) else 0.0


def _raise(entries: list[_Entry], at: int, score: float) -> None:
    """Give an entry at least this score, and its neighbours a share of it; more of them where a block goes on."""
    entries[at].score = max(entries[at].score, score)
    share = score / 2
    for after in range(at + 1, len(entries)):
        entry = entries[after]
        if share < 1 or entry.start != entries[after - 1].end:
            break
        entry.score = max(entry.score, share)
        share *= 0.92 if not entry.text or entry.text[0] in " \t" else 0.75
    share = score / 2.5
    for before in range(at - 1, -1, -1):
        if share < 1 or entries[before].end != entries[before + 1].start:
            break
        entries[before].score = max(entries[before].score, share)
        share *= 0.6


def _render(entries: list[_Entry], chosen: Iterable[int], total: int) -> str:
    parts: list[str] = []
    end = 0
    for at in sorted(chosen):
        entry = entries[at]
        if entry.start > end:
            parts.append(_left_out(entry.start - end))
        parts.append(entry.text)
        end = entry.end
    if total > end:
        parts.append(_left_out(total - end))
    return "\n".join([*parts, ""])


def _left_out(lines: int) -> str:
    return f"[... {lines:,} line{'s' * (lines > 1)} left out ...]"
