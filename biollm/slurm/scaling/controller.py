"""Measures the demand for each scaled model, and starts or stops a server of it through `jobs.py`.

A user has one controller per cluster: the gateway, `biollm autoscale --watch`, or one look after another from cron.
They share `scale-CLUSTER-UID.json` in the run directory (0600): the figures of the last minutes, and the last decision.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

from biollm._files import locked, write_private
from biollm.config import Cluster, Config, Model, Scale
from biollm.config.paths import biollm_dir
from biollm.errors import BiollmError
from biollm.ledger import Ledger
from biollm.slurm import commands, jobs
from biollm.slurm.endpoints import Records, load
from biollm.slurm.jobs import Job, Options
from biollm.slurm.scaling.decision import UNSERVED_S, Decision, Delays, Look, decide, measured
from biollm.types import span

INTERVAL_S = 10.0  # between two looks
_STALE_S = 600.0  # without a look: no controller seems to run


@dataclass(frozen=True)
class State:
    """What is kept of a model: its looks, oldest first, and the last decision.

    Attributes:
        changed: The last decision that started or stopped a server, with its time.
        stopped: When a server was last stopped, in epoch seconds.
        started: The submissions made here. Others count as servers, but are not stopped.
    """

    looks: Sequence[Look] = ()
    line: str = ""
    changed: str = ""
    stopped: float = 0.0
    started: Sequence[str] = ()


def scaled(config: Config) -> dict[str, State]:
    """Return what is kept of each model with `scale`; the line also says what changed last, or if no controller runs."""
    found = [key for key, model in config.models.items() if model.scale]
    kept = _load(config.cluster) if found else {}
    return {key: replace(kept.get(key, State()), line=_line(kept.get(key, State()))) for key in found}


def _line(state: State) -> str:
    ago = time.time() - (state.looks[-1].at if state.looks else 0.0)
    if ago > _STALE_S:
        last = f"has looked for {span(ago)}" if state.looks else "has looked yet"
        return f"not scaled: no controller {last}; run `biollm serve`, or `biollm autoscale` from cron"
    return f"{state.line} (last: {state.changed})" if state.changed else state.line


def controlling(cluster: Cluster) -> AbstractContextManager[bool]:
    """Be the user's controller of this cluster; yields False while another process is."""
    jobs.make_biollm_dir(cluster)
    return locked(_path(cluster, "lock"), wait=False)


def run(cluster: Cluster, look: Callable[[], Mapping[str, Decision]], wait: Callable[[float], object], say: Callable[[str], None]) -> None:  # fmt: skip
    """Call `look` every 10 s while this is the user's controller, until `wait` returns true; `say` what changes."""
    while True:
        with controlling(cluster) as alone:
            while alone:
                try:
                    for line in (f"{model}: {each.line}" for model, each in look().items() if each.change):
                        say(line)
                except Exception as error:  # the next look may be better
                    say(f"Scaling failed: {error}")
                if wait(INTERVAL_S):
                    return
        if wait(INTERVAL_S):
            return


def look(
    config: Config, ledger: Ledger, budgets: Callable[[], Mapping[str, str]] = dict, delays: Delays | None = None
) -> dict[str, Decision]:
    """Look once at each scaled model, start or stop at most one server of each, and return the decisions.

    `budgets` returns, for each model, the budget that is nearly used up, after which requests come to it.
    """
    cluster, delays, now = config.cluster, delays or Delays(), time.time()
    states, decisions, ending = _load(cluster), dict[str, Decision](), budgets()
    error = commands.queue(biollm_dir(cluster), cluster.name).error
    known, alive, unserved = jobs.status(cluster), Records(cluster).read()[0], ledger.unserved(now - UNSERVED_S)
    for key in scaled(config):
        state, mine = states.get(key, State()), [job for job in known if key in job.submission.models]
        requests = {start: counts for job in mine for start, counts in job.requests.items()}
        servers = [requests[e.start] if e.start in requests else load(e) for e in alive if e.model == key]
        # a pending job with a predecessor in its chain takes that one's place
        coming = sum(job.phase == "starting" or (job.phase, job.submission.link) == ("pending", 1) for job in mine)
        times = [at for model, at in unserved if model == key]
        seen = replace(measured(now, servers, coming, times, state.looks), budget=ending.get(key, ""))
        looks = [*(each for each in state.looks if each.at > now - 2 * delays.quiet), seen]
        downs = [float(event["at"]) for job in mine for event in job.submission.events if event["reason"] == "down"]
        state = replace(state, looks=looks, stopped=max(state.stopped, *downs, 0.0))  # those by hand, too
        decision = Decision(0, f"not scaled: {error}")
        if not error:
            decision, state = _act(config.models[key], cluster, state, mine, delays)
        if decision.change:
            state = replace(state, changed=time.strftime("%H:%M UTC ", time.gmtime(now)) + decision.line)
        states[key], decisions[key] = replace(state, line=decision.line), decision
        rows = {name: vars(each) | {"looks": [astuple(look) for look in each.looks]} for name, each in states.items()}
        write_private(_path(cluster, "json"), json.dumps(rows))
    return decisions


def _act(model: Model, cluster: Cluster, state: State, mine: Sequence[Job], delays: Delays) -> tuple[Decision, State]:
    now, scale = state.looks[-1], model.scale or Scale()
    choose = partial(
        decide, scale, state.looks, delays, stopped=state.stopped, broken=_broken(mine, now.at - delays.hold)
    )
    try:
        decision = choose()
        if decision.change > 0:  # only then is Slurm asked
            decision = choose(starts_in=jobs.answers_in(model, cluster))
        if decision.change > 0:
            permanent = Options(idle_timeout=0) if now.ready + now.coming < scale.min else None
            new = [job.submission.id for job in jobs.up([model], cluster, permanent, wait=False)]
            return decision, replace(state, started=[*state.started, *new][-100:])
        if decision.change < 0:
            ours = [job for job in mine if job.submission.id in state.started and job.phase in _STOPPABLE]
            if not ours:
                return Decision(0, "not scaled: quiet, but its servers were started by hand"), state
            jobs.down(cluster, min(ours, key=_worth).submission.job, wait=False)
            return decision, replace(state, stopped=now.at)
    except BiollmError as error:
        decision = Decision(0, f"not scaled: {str(error).splitlines()[0]}")
    return decision, state


_STOPPABLE = ("pending", "starting", "ready")  # in this order


def _worth(job: Job) -> tuple[int, int, float]:
    requests = sum(sum(each) for each in job.requests.values() if each)
    return _STOPPABLE.index(job.phase), requests, -job.submission.submitted


def _broken(mine: Sequence[Job], since: float) -> str:
    """Return why another start would probably fail: the last one just has."""
    for job in sorted(mine, key=lambda job: job.submission.submitted)[-1:]:
        failed = job.phase == "failed" and not job.reason.startswith("CANCELLED")
        if failed and max(job.submission.seen, job.submission.submitted) > since:
            return f"job {job.submission.job} has failed: {job.reason}"
    return ""


def _path(cluster: Cluster, kind: str) -> Path:
    return biollm_dir(cluster) / f"scale-{cluster.name}-{os.getuid()}.{kind}"


def _load(cluster: Cluster) -> dict[str, State]:
    try:
        found = json.loads(_path(cluster, "json").read_text()).items()
        return {key: State(**state | {"looks": [Look(*look) for look in state["looks"]]}) for key, state in found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
