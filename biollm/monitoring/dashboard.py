"""Draws a snapshot as text for a terminal or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from biollm.monitoring.snapshot import CandidateView, JobView, LimitUse, Minute, Snapshot
from biollm.types import short

_LOOK = {"ready": ("●", 32), "failing": ("✖", 31), "refused": ("✖", 31), "cooling": ("◐", 33), "limited": ("◐", 33)}
_UNUSABLE = ("keyless", "absent", "unfit")  # shown last, where there is no room for all
_SPANS = ((172800, 86400, "d"), (7200, 3600, "h"), (120, 60, "m"))  # from so many seconds on, in these
_PHASES = {"ready": 32, "failed": 31, "unknown": 31}


def render(snapshot: Snapshot, width: int = 80, height: int | None = None, *, color: bool = False) -> str:
    """Return the snapshot as text of at most `width` columns and `height` lines; of any height when None."""
    head = time.strftime("biollm top  %Y-%m-%d %H:%M:%S UTC", time.gmtime(snapshot.at))
    if height is not None:
        head = _cut(f"{head}{'q quits':>{max(9, width - len(head))}}", width)
    series = [_cut(line, width) for line in _series_lines(snapshot.minutes)]
    alerts = [_cut(f"ALERT  {alert}", width) for alert in snapshot.alerts]
    names = _names(snapshot.candidates, width)
    first = next((each for each in snapshot.candidates if each.state in ("ready", "failing")), None)
    candidates = [_candidate(each, width, color, names, first=each is first) for each in snapshot.candidates]
    jobs = [_job(job, width, color, names) for job in snapshot.jobs] or ["      none"]
    scaling = [_cut(f"      {line}", width) for line in snapshot.scaling]
    if height is not None:
        alerts, scaling = _fit(alerts, 3), _fit(scaling, 3)
        room = max(
            2, height - 6 - len(alerts) - len(series) - len(scaling)
        )  # head, two titles, blank lines between the parts
        jobs = _fit(jobs, max(1, room - len(candidates), room // 3))
        candidates = _fit_usable(snapshot.candidates, candidates, room - len(jobs))
    titles = [
        f"   #  {'deployment':{names}} {'status':13} last  limits, or reason",
        f"      {'job':8} {'model':{names - 9}} {'phase':13} left  node",
    ]
    titles = [f"\033[1m{_cut(title, width)}\033[0m" if color else _cut(title, width) for title in titles]
    alerts = [f"\033[31m{alert}\033[0m" if color else alert for alert in alerts]
    lines = [head, "", titles[0], *candidates, "", titles[1], *jobs, *scaling, "", *series, *alerts]
    return "\n".join(line.rstrip() for line in lines[:height])


def _line(text: str, width: int, names: int, hue: int | None = None) -> str:
    """Return a row that fits, its column of states in a colour."""
    text, at = _cut(text, width), 7 + names
    return text if hue is None else f"{text[:at]}\033[{hue}m{text[at : at + 13]}\033[0m{text[at + 13 :]}"


def _names(candidates: Sequence[CandidateView], width: int) -> int:
    """Return the width of the column of names: what they need, as far as the terminal has it."""
    return max(27, min(max((len(each.deployment) for each in candidates), default=0), width - 65))


def _fit_usable(candidates: Sequence[CandidateView], lines: list[str], room: int) -> list[str]:
    """Return the lines that there is room for; what cannot be used goes first, and is counted in the last line."""
    if len(lines) <= room:
        return lines
    usable = [at for at, each in enumerate(candidates) if each.state not in _UNUSABLE]
    rest = [at for at, each in enumerate(candidates) if each.state in _UNUSABLE]
    kept = sorted([*usable, *rest][: room - 1])
    return [*(lines[at] for at in kept), f"      ... {len(lines) - len(kept)} more"]


def _fit(lines: list[str], room: int) -> list[str]:
    return lines if len(lines) <= room else [*lines[: room - 1], f"    ... {len(lines) - room + 1} more"]


def _candidate(candidate: CandidateView, width: int, color: bool, names: int, *, first: bool) -> str:
    glyph, hue = _LOOK.get(candidate.state, ("○", 90))
    state = f"{glyph} {candidate.state} {'' if candidate.frees_s is None else span(candidate.frees_s)}"
    said = candidate.why
    if candidate.state in ("ready", "limited") and candidate.quotas:
        tightest = max(candidate.quotas, key=_share)
        full = int(6 * min(1.0, _share(tightest)))
        said = f"{'█' * full}{'░' * (6 - full)} {short(tightest.used)} of {tightest.limit}"
    mark, name = "→" if first else " ", f"{_cut(candidate.deployment, names):{names}}"
    text = f"{mark} {candidate.place:2}  {name} {state:13} {span(candidate.last_s):>4}  {said}"
    return _line(text, width, names, hue if color else None)


def _job(job: JobView, width: int, color: bool, names: int) -> str:
    said = "  ".join(filter(None, (job.node, job.reason)))
    models = f"{_cut(job.models, names - 9):{names - 9}}"
    text = f"      {_cut(job.job, 8):8} {models} {job.phase:13} {span(job.left_s):>4}  {said}"
    return _line(text, width, names, _PHASES.get(job.phase, 33) if color else None)


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
