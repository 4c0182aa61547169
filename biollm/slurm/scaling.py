"""Starts and stops servers of the models with `scale` by demand: a pure decision, then what measures and acts.

KEDA and Ray Serve need a cluster of their own. Under Slurm a job may wait for hours: jobs on their way count as servers,
and none is started that would come after the backlog has drained. `scale-*.json` in the run directory holds figures.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from biollm._files import locked, write_private
from biollm.config import Cluster, Config, Model, Scale
from biollm.config.paths import biollm_dir
from biollm.errors import BiollmError, SlurmError
from biollm.ledger import Ledger
from biollm.slurm import commands, jobs
from biollm.slurm.endpoints import Records, load
from biollm.types import counted, span

UNSERVED_S = 120.0  # seconds for which a request that found no server counts
_FULL = 0.8  # share of the slots that may be busy once a server has stopped
_STOPPABLE = ("pending", "starting", "ready")  # in this order
_STALE_S = 600.0  # without a look: no controller seems to run


@dataclass(frozen=True)
class Delays:
    """Seconds of demand before a start, of quiet before a stop, and from a stop (or a failed start) to the next start."""

    demand: float = 30.0
    quiet: float = 600.0
    hold: float = 600.0


@dataclass(frozen=True)
class Look:
    """The figures of a model at a time."""

    at: float  # epoch seconds
    ready: int = 0  # servers that answer
    coming: int = 0  # jobs that are pending or starting
    running: int = 0  # requests at the servers
    waiting: int = 0
    unserved: int = 0  # requests of the last two minutes that found no server
    unserved_s: float = 0.0  # from the first of them to the last
    slots: float = 1.0  # requests that a server runs at once, as seen when others last waited
    budget: str = ""  # one that is nearly used up, after which requests come here

    def __str__(self) -> str:
        if self.unserved and not self.ready:
            return f"{counted(self.unserved, 'request')} found no server in 2 min"
        return self.budget or f"{self.running} running and {self.waiting} waiting at {counted(self.ready, 'server')}"


class Decision(NamedTuple):
    """How many servers to add (1, 0 or -1), and why in one line."""

    change: int
    line: str


def measured(
    at: float, servers: Sequence[tuple[int, int] | None], coming: int, unserved: Sequence[float], before: Sequence[Look]
) -> Look:
    """Return a look of the (running, waiting) requests at each server, and the times of those that found none."""
    counts = [each or (0, 0) for each in servers]
    last = before[-1].slots if before else 1.0
    full = max((running for running, waiting in counts if waiting), default=last)
    running, waiting = (sum(each[place] for each in counts) for place in (0, 1))
    span_s = unserved[-1] - unserved[0] if unserved else 0.0
    slots = max(1.0, full, (full + last) / 2)  # one that has just begun is not full, though others wait
    return Look(at, len(counts), coming, running, waiting, len(unserved), span_s, slots)


def decide(
    scale: Scale, looks: Sequence[Look], delays: Delays, *, stopped: float = 0.0, starts_in: float = 0.0, broken: str = ""
) -> Decision:  # fmt: skip
    """Decide about one model from its looks, oldest first.

    Args:
        stopped: When one of its servers was last stopped, in epoch seconds.
        starts_in: Seconds until a server submitted now would answer.
        broken: Why the next start would probably fail.
    """
    now = looks[-1]
    have, needed = now.ready + now.coming, _needed(scale, now)
    if max(scale.min, needed) > have:
        why = _obstacle(scale, looks, delays, stopped, starts_in) or broken
        because = f"min is {scale.min}" if have < scale.min else now
        return Decision(0, f"not scaled: {why}") if why else Decision(1, f"scaled up to {have + 1}: {because}")
    if now.coming and needed > now.ready:
        return Decision(0, f"not scaled: {counted(now.coming, 'job')} pending or starting")
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
        return f"a server was stopped {span(now.at - stopped)} ago, less than {span(delays.hold)}"
    if have < scale.min or (now.budget and not now.ready):  # no demand is needed
        return ""
    seen = now.at - recent[0].at if all(_needed(scale, look) > have for look in recent) else 0.0
    if (seen if now.ready else now.unserved_s) < delays.demand:
        return f"{now}, for less than {span(delays.demand)}"
    if now.ready and (fell := recent[0].waiting - now.waiting) > 0:
        drained = now.waiting * (now.at - recent[0].at) / fell
        if drained <= starts_in:
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


@dataclass(frozen=True)
class State:
    """What is kept of a model."""

    looks: Sequence[Look] = ()  # oldest first
    line: str = ""  # the last decision
    changed: str = ""  # the last one that started or stopped a server, with its time
    stopped: float = 0.0  # when a server was last stopped, in epoch seconds
    started: Sequence[str] = ()  # the submissions made here; others count as servers, but are not stopped


def scaled(config: Config) -> dict[str, State]:
    """Return what is kept of each model with `scale`; the line also says what changed last, or if no controller runs."""
    found = [key for key, model in config.models.items() if model.scale]
    kept = _load(config.cluster) if found else {}
    return {key: replace(kept.get(key, State()), line=_line(kept.get(key, State()))) for key in found}


def _line(state: State) -> str:
    if not state.looks or time.time() - state.looks[-1].at > _STALE_S:
        return "not scaled: no controller has looked for 10 min; run `biollm serve`, or `biollm autoscale` from cron"
    last = "" if state.changed.endswith(state.line) else state.changed
    return f"{state.line} (last: {last})" if last else state.line


def controlling(cluster: Cluster) -> AbstractContextManager[bool]:
    """Be the user's controller of this cluster; yields False while another process is."""
    return locked(jobs.make_biollm_dir(cluster) / _path(cluster, "lock").name, wait=False)


def look(
    config: Config, ledger: Ledger, budgets: Mapping[str, str], delays: Delays | None = None
) -> dict[str, Decision]:  # fmt: skip
    """Look once at each scaled model, start or stop at most one server of each, and return the decisions.

    `budgets` holds, for each model, the budget that is nearly used up, after which requests come to it.
    """
    cluster, now, delays, decisions = config.cluster, time.time(), delays or Delays(), dict[str, Decision]()
    states, unserved = _load(cluster), ledger.unserved(now - UNSERVED_S)
    known, alive = jobs.status(cluster), Records(cluster).read()[0]
    for key in scaled(config):
        mine = [job for job in known if key in job.submission.models]
        mine = [job for job in mine if job.phase != "pending" or job.submission.link == 1]  # others wait to take over
        requests = {start: counts for job in mine for start, counts in job.requests.items()}
        servers = [requests[e.start] if e.start in requests else load(e) for e in alive if e.model == key]
        coming = sum(job.phase in ("pending", "starting") for job in mine)
        state, times = states.get(key, State()), [at for model, at in unserved if model == key]
        seen = replace(measured(now, servers, coming, times, state.looks), budget=budgets.get(key, ""))
        looks = [*(each for each in state.looks if each.at > now - 2 * delays.quiet), seen]
        downs = [float(event["at"]) for job in mine for event in job.submission.events if event["reason"] == "down"]
        state = replace(state, looks=looks, stopped=max(state.stopped, *downs, 0.0))  # those by hand, too
        try:
            if error := commands.queue(biollm_dir(cluster), cluster.name).error:
                raise SlurmError(error)
            decision, state = _act(config.models[key], cluster, state, mine, delays)
        except BiollmError as failure:
            decision = Decision(0, f"not scaled: {str(failure).splitlines()[0]}")
        if decision.change:
            state = replace(state, changed=time.strftime("%H:%M UTC ", time.gmtime(now)) + decision.line)
        states[key], decisions[key] = replace(state, line=decision.line), decision
        rows = {name: vars(each) | {"looks": [astuple(look) for look in each.looks]} for name, each in states.items()}
        write_private(_path(cluster, "json"), json.dumps(rows))
    return decisions


def _act(
    model: Model, cluster: Cluster, state: State, mine: Sequence[jobs.Job], delays: Delays
) -> tuple[Decision, State]:
    now, scale, broken = state.looks[-1], model.scale or Scale(), ""
    if mine and mine[-1].phase == "failed" and not mine[-1].reason.startswith("CANCELLED"):
        last = mine[-1].submission
        if max(last.seen, last.submitted) > now.at - delays.hold:
            broken = f"job {last.job} has failed: {mine[-1].reason}"
    choose = partial(decide, scale, state.looks, delays, stopped=state.stopped, broken=broken)
    decision = choose()
    if decision.change > 0:  # only then is Slurm asked
        decision = choose(starts_in=jobs.answers_in(model, cluster))
    if decision.change > 0:
        permanent = jobs.Options(idle_timeout=0) if now.ready + now.coming < scale.min else None
        new = [job.submission.id for job in jobs.up([model], cluster, permanent, wait=False)]
        return decision, replace(state, started=[*state.started, *new][-100:])
    if decision.change < 0:
        ours = [job for job in reversed(mine) if job.submission.id in state.started and job.phase in _STOPPABLE]
        if not ours:
            return Decision(0, "not scaled: quiet, but its servers were started by hand"), state
        least = min(ours, key=lambda job: (_STOPPABLE.index(job.phase), [*filter(None, job.requests.values())]))
        jobs.down(cluster, least.submission.job, wait=False)
        return decision, replace(state, stopped=now.at)
    return decision, state


def _path(cluster: Cluster, kind: str) -> Path:
    return biollm_dir(cluster) / f"scale-{cluster.name}-{os.getuid()}.{kind}"


def _load(cluster: Cluster) -> dict[str, State]:
    try:
        found = json.loads(_path(cluster, "json").read_text()).items()
        return {key: State(**state | {"looks": [Look(*look) for look in state["looks"]]}) for key, state in found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
