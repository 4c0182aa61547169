"""Draws a snapshot as text for a terminal or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from biollm.monitoring.snapshot import CandidateView, JobView, LimitUse, Minute, Snapshot
from biollm.types import short

_LOOK = {"ready": ("●", 32), "failing": ("✖", 31), "refused": ("✖", 31), "cooling": ("◐", 33), "limited": ("◐", 33)}
_SPANS = ((172800, 86400, "d"), (7200, 3600, "h"), (120, 60, "m"))  # from so many seconds on, in these
_PHASES = {"ready": 32, "failed": 31, "unknown": 31}


def render(snapshot: Snapshot, width: int = 80, height: int | None = None, *, color: bool = False) -> str:
    """Return the snapshot as text of at most `width` columns and `height` lines; of any height when None."""
    head = time.strftime("biollm top  %H:%M:%S UTC", time.gmtime(snapshot.at))
    series = [_cut(line, width) for line in _series_lines(snapshot.minutes)]
    alerts = [_cut(f"ALERT  {alert}", width) for alert in snapshot.alerts]
    jobs = [_job(job, width, color) for job in snapshot.jobs] or ["    none"]
    candidates = [_candidate(each, width, color) for each in snapshot.candidates]
    if height is not None:
        alerts = _fit(alerts, 3)
        room = max(2, height - 6 - len(alerts) - len(series))  # head, two titles, blank lines between the parts
        jobs = _fit(jobs, max(1, room - len(candidates), room // 3))
        candidates = _fit(candidates, room - len(jobs))
    titles = [
        f" #  {'candidate':27} {'state':13} last  limits, or why not",
        f"    {'job':8} {'model':18} {'state':13} left  node",
    ]
    titles = [f"\033[1m{_cut(title, width)}\033[0m" if color else _cut(title, width) for title in titles]
    alerts = [f"\033[31m{alert}\033[0m" if color else alert for alert in alerts]
    lines = [head, "", titles[0], *candidates, "", titles[1], *jobs, "", *series, *alerts]
    return "\n".join(line.rstrip() for line in lines[:height])


def _line(text: str, width: int, hue: int | None = None) -> str:
    """Return a row that fits, its column of states in a colour."""
    text = _cut(text, width)
    return text if hue is None else f"{text[:32]}\033[{hue}m{text[32:45]}\033[0m{text[45:]}"


def _fit(lines: list[str], room: int) -> list[str]:
    return lines if len(lines) <= room else [*lines[: room - 1], f"    ... {len(lines) - room + 1} more"]


def _candidate(candidate: CandidateView, width: int, color: bool) -> str:
    glyph, hue = _LOOK.get(candidate.state, ("○", 90))
    state = f"{glyph} {candidate.state} {'' if candidate.frees_s is None else span(candidate.frees_s)}"
    said = candidate.why
    if candidate.state in ("ready", "limited") and candidate.quotas:
        tightest = max(candidate.quotas, key=_share)
        full = int(6 * min(1.0, _share(tightest)))
        said = f"{'█' * full}{'░' * (6 - full)} {short(tightest.used)} of {tightest.limit}"
    text = f"{candidate.place:2}  {_cut(candidate.deployment, 27):27} {state:13} {span(candidate.last_s):>4}  {said}"
    return _line(text, width, hue if color else None)


def _job(job: JobView, width: int, color: bool) -> str:
    said = "  ".join(filter(None, (job.node, job.reason)))
    text = f"    {_cut(job.job, 8):8} {_cut(job.models, 18):18} {job.phase:13} {span(job.left_s):>4}  {said}"
    return _line(text, width, _PHASES.get(job.phase, 33) if color else None)


def _series_lines(minutes: Sequence[Minute]) -> list[str]:
    def line(title: str, values: Sequence[float | None], say: Callable[[float], str], top: float | None = None) -> str:
        known = [value for value in values if value is not None]
        said = f"{say(known[-1])} last, {say(max(known))} at most" if known else "nothing in 30 min"
        return f"{title:13} {_spark(values, top)}  {said}"

    return [
        line("requests/min", [minute.requests for minute in minutes], "{:.0f}".format),
        line("latency p50", [minute.ms for minute in minutes], seconds),
        line("fallback", [minute.fallback for minute in minutes], "{:.0%}".format, 1.0),
    ]


def _spark(values: Sequence[float | None], top: float | None = None) -> str:
    high = top or max((value for value in values if value), default=0.0) or 1.0
    return "".join(" " if not value else "▁▂▃▄▅▆▇█"[min(7, int(8 * value / high))] for value in values)


def _share(quota: LimitUse) -> float:
    return quota.used / quota.amount if quota.amount else 1.0


def _cut(text: str, width: int) -> str:
    """Return `text` in `width` columns, without anything that a terminal would obey."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= width else f"{plain[: max(0, width - 1)]}…"


def span(value: float | None) -> str:
    """Return seconds in at most four letters: 42s, 12m, 3h, 2d."""
    if value is None:
        return "-"
    _, size, unit = next((each for each in _SPANS if value >= each[0]), (0, 1, "s"))
    return f"{value / size:.0f}{unit}"


def seconds(ms: float) -> str:
    """Return milliseconds as 850 ms or 1.2 s."""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"
