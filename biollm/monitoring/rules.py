"""The rules of `alerts:` in providers.yaml, and the alerts that they yield."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from biollm.types import counted, iso

if TYPE_CHECKING:
    from biollm.config import Alerts
    from biollm.monitoring.snapshot import JobView, Snapshot
    from biollm.monitoring.usage import Quota, Report, Row

_DOWN = ("refused", "failing", "cooling")


@dataclass
class Alert:
    """A rule that holds, or held."""

    rule: str  # its name under `alerts:`
    about: str  # a limit, deployment or job; empty for all requests
    text: str  # one sentence
    since: float = 0.0  # epoch seconds since when it holds; if `over`, since when it does not
    over: bool = False
    pending: list[str] = field(default_factory=list[str])  # the targets whose last message about it is out of date

    @property
    def facts(self) -> dict[str, Any]:
        """Return what is reported of it."""
        return {"rule": self.rule, "about": self.about, "text": self.text, "since": iso(self.since)}

    def __str__(self) -> str:
        return f"resolved: {self.text}" if self.over else self.text


def holding(rules: Alerts, usage: Report, snapshot: Snapshot, down: Mapping[str, float]) -> Iterator[Alert]:
    """Yield the rules that hold, by the usage of their window and since when each deployment is down."""
    yield from _rates(rules, usage.total)
    yield from _budgets(rules, usage.quotas)
    for candidate in snapshot.candidates if rules.down is not None else ():
        name, lasts = candidate.deployment, snapshot.at - down.get(candidate.deployment, snapshot.at)
        if name in down and lasts >= (rules.down or 0):
            yield Alert("down", name, f"{name} has not answered for {_span(lasts)}: {candidate.why}")
    yield from _jobs(rules, snapshot.jobs)


def _rates(rules: Alerts, row: Row) -> Iterator[Alert]:
    many, p95 = counted(row.requests, "request"), (row.p95_ms or 0.0) / 1000
    for rule, value, text in (
        ("error_rate", row.error_rate, f"{row.error_rate:.0%} of {many} got no answer"),
        ("fallback_rate", row.fallback_rate, f"{row.fallback_rate:.0%} of {many} fell back to a later deployment"),
        ("p95", p95, f"5% of {many} took over {p95:.1f} s"),
    ):
        bound = getattr(rules, rule)
        if bound is not None and value > bound and row.requests >= rules.at_least:
            yield Alert(rule, "", f"{text} in the last {_span(rules.window)}")


def _budgets(rules: Alerts, limits: Sequence[Quota]) -> Iterator[Alert]:
    for each in limits if rules.budget_share is not None else ():
        budget = each.unit != "requests" and each.limit.endswith(("/day", "/month"))  # others free by themselves
        if budget and each.used >= (rules.budget_share or 0) * each.amount:
            text = f"{each.scope} has used {each.used / each.amount:.0%} of {each.limit}"
            yield Alert("budget_share", f"{each.scope} {each.limit}", text)


def _jobs(rules: Alerts, jobs: Sequence[JobView]) -> Iterator[Alert]:
    ready = [job for job in jobs if job.phase == "ready"]
    for job in jobs:
        if rules.job_failed and job.phase == "failed" and not job.reason.startswith("CANCELLED"):
            yield Alert("job_failed", job.job, f"job {job.job} ({job.models}) failed: {job.reason}")
    for job in ready if rules.expires is not None else ():
        if job.left_s is not None and job.left_s < (rules.expires or 0):
            later = [each.models.split(", ") for each in ready if (each.left_s or 0.0) > job.left_s]
            if not set(job.models.split(", ")) <= {model for models in later for model in models}:
                text = f"the server of {job.models} (job {job.job}) ends in {_span(job.left_s)}"
                yield Alert("expires", job.job, text)


def down_since(before: Mapping[str, float], snapshot: Snapshot) -> dict[str, float]:
    """Return since when each deployment that fails or is on cooldown has neither been ready nor answered."""
    found: dict[str, float] = {}
    for each in snapshot.candidates:
        if each.state in _DOWN:
            answered = 0.0 if each.last_s is None else snapshot.at - each.last_s
            found[each.deployment] = max(before.get(each.deployment, snapshot.at), answered)
    return found


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
