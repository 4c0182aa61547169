"""Decides from a model's figures of the last minutes whether it needs a server more or a server less. Pure.

KEDA and Ray Serve scale by demand, and need Kubernetes or a cluster of their own. Under Slurm a job may wait for hours:
jobs on their way count as servers, and none is started that would come after the backlog has drained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from biollm.config import Scale
from biollm.types import span

UNSERVED_S = 120.0  # seconds for which a request that found no server counts
_FULL = 0.8  # share of the slots that may be busy once a server has stopped


@dataclass(frozen=True)
class Delays:
    """Seconds of demand before a start, of quiet before a stop, and from a stop (or a failed start) to the next start."""

    demand: float = 30.0
    quiet: float = 600.0
    hold: float = 600.0


@dataclass(frozen=True)
class Look:
    """The figures of a model at the time `at` (epoch seconds).

    Attributes:
        ready: Servers that answer; `coming`: jobs that are pending or starting.
        running, waiting: Requests at the servers.
        unserved: Requests of the last two minutes that found no server; `unserved_s`: from the first to the last.
        slots: Requests that a server runs at once, as seen when others last waited; 1 before that.
        budget: The budget that is nearly used up, after which requests come here; "" for none.
    """

    at: float
    ready: int = 0
    coming: int = 0
    running: int = 0
    waiting: int = 0
    unserved: int = 0
    unserved_s: float = 0.0
    slots: float = 1.0
    budget: str = ""

    def __str__(self) -> str:
        if self.ready or not self.unserved:
            return self.budget or f"{self.running} running and {self.waiting} waiting at {_count(self.ready, 'server')}"
        return f"{_count(self.unserved, 'request')} found no server in 2 min"


def measured(
    at: float, servers: Sequence[tuple[int, int] | None], coming: int, unserved: Sequence[float], before: Sequence[Look]
) -> Look:
    """Return a look of the (running, waiting) requests at each server, and the times of those that found none."""
    counts = [each or (0, 0) for each in servers]
    times = [each for each in unserved if each > at - UNSERVED_S]
    last = before[-1].slots if before else 1.0
    full = max((running for running, waiting in counts if waiting), default=last)
    running, waiting = (sum(each[place] for each in counts) for place in (0, 1))
    span_s = times[-1] - times[0] if times else 0.0
    slots = max(1.0, full, (full + last) / 2)  # one that has just begun is not full, though others wait
    return Look(at, len(counts), coming, running, waiting, len(times), span_s, slots)


class Decision(NamedTuple):
    """How many servers to add: 1, 0 or -1; `line` says why."""

    change: int
    line: str


def decide(
    scale: Scale,
    looks: Sequence[Look],
    delays: Delays,
    *,
    stopped: float = 0.0,
    starts_in: float = 0.0,
    broken: str = "",
) -> Decision:
    """Decide about one model from its looks, oldest first.

    Args:
        scale, looks, delays: See there.
        stopped: When one of its servers was last stopped, in epoch seconds.
        starts_in: Seconds until a server submitted now would answer; inf if Slurm cannot say.
        broken: Why the next start would probably fail.
    """
    now = looks[-1]
    have, needed = now.ready + now.coming, _needed(scale, now)
    if max(scale.min, needed) > have:
        why = _obstacle(scale, looks, delays, stopped, starts_in) or broken
        because = f"min is {scale.min}" if have < scale.min else now
        return Decision(0, f"not scaled: {why}") if why else Decision(1, f"scaled up to {have + 1}: {because}")
    if now.coming and needed > now.ready:
        return Decision(0, f"not scaled: {_count(now.coming, 'job')} pending")
    past = _since(looks, now.at - delays.quiet)
    if have > scale.min and now.at - past[0].at >= delays.quiet and have > max(map(_used, past)):
        return Decision(-1, f"scaled down to {have - 1}: quiet for {span(delays.quiet)}")
    return Decision(0, f"enough: {now}")


def _obstacle(scale: Scale, looks: Sequence[Look], delays: Delays, stopped: float, starts_in: float) -> str:
    """Return why no server may be added though one is needed; "" if nothing is in the way."""
    now = looks[-1]
    have, recent = now.ready + now.coming, _since(looks, now.at - delays.demand)
    if have >= scale.max:
        return f"{now}, max is {scale.max}"
    if now.at - stopped < delays.hold:
        wait = span(stopped + delays.hold - now.at)
        return f"a server was stopped {span(now.at - stopped)} ago, the next may start in {wait}"
    if have < scale.min or now.budget:  # no demand is needed
        return ""
    seen = now.at - recent[0].at if all(_needed(scale, look) > have for look in recent) else 0.0
    if (seen if now.ready else now.unserved_s) < delays.demand:
        return f"{now}, for less than {span(delays.demand)}"
    fell = recent[0].waiting - now.waiting
    drained = now.waiting * (now.at - recent[0].at) / fell if now.ready and fell > 0 else math.inf
    if drained <= starts_in and drained < math.inf:
        return f"the backlog drains in {span(drained)}, a server would answer in {span(starts_in)}"
    return ""


def _needed(scale: Scale, look: Look) -> int:
    """Return how many servers the demand needs."""
    if not look.ready:
        return int(bool(look.unserved or look.budget))
    return look.ready + max(0, math.ceil((look.waiting - scale.target_waiting * look.ready) / look.slots))


def _used(look: Look) -> int:
    """Return how many servers could carry the load."""
    load = (look.running + look.waiting) / max(1.0, _FULL * look.slots)
    return max(math.ceil(load), int(bool(look.unserved or look.budget)))


def _since(looks: Sequence[Look], begin: float) -> Sequence[Look]:
    """Return the looks from the last one at or before `begin` on."""
    return looks[max((place for place, look in enumerate(looks) if look.at <= begin), default=0) :]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
