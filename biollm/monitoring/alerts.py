"""Tells when a rule of `alerts:` in providers.yaml begins to hold, and when it ends; each once, to each target.

Prometheus' Alertmanager does that for who runs one. A user of a cluster has cron at best.
"""

from __future__ import annotations

import html
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biollm._files import locked, write_private
from biollm._ownership import is_private
from biollm.config.paths import own_dir, state_dir
from biollm.errors import Problem
from biollm.types import known

if TYPE_CHECKING:
    from biollm.config import Alerts, Config
    from biollm.ledger import Ledger
    from biollm.monitoring.snapshot import Snapshot
    from biollm.monitoring.usage import Report

PATIENCE = 10.0  # seconds for a target
_KEEP = 86400.0  # seconds for which a target that fails is tried again
_FRESH = 7200.0  # seconds after which nobody seems to look at the rules any more
_FORGOTTEN = 8 * 86400.0  # seconds; Slurm's jobs are remembered for a week
_AHEAD = 600.0  # seconds by which another node's clock may be ahead
_DOWN = ("refused", "failing", "cooling")
Told = Callable[[str], None]


@dataclass
class Alert:
    """A rule that holds, or held.

    Attributes:
        rule: Its name under `alerts:`.
        about: A budget, rung or job; empty where it is about all requests.
        text: One sentence.
        since: Epoch seconds since when it holds; or, when `over`, since when it does not.
        pending: The targets that have not been told.
    """

    rule: str
    about: str
    text: str
    since: float = 0.0
    over: bool = False
    pending: list[str] = field(default_factory=list[str])

    @property
    def facts(self) -> dict[str, Any]:
        """Return what others are told of it."""
        since = datetime.fromtimestamp(self.since, UTC).isoformat(timespec="seconds")
        return {"rule": self.rule, "about": self.about, "text": self.text, "since": since}

    def __str__(self) -> str:
        return f"resolved: {self.text}" if self.over else self.text


Target = Callable[[Sequence[Alert]], None]


def check(
    config: Config,
    ledger: Ledger,
    snapshot: Snapshot,
    state: Path,
    tell: Told,
    *,
    log: bool = False,
    patience: float = PATIENCE,
) -> list[Alert]:
    """Evaluate the rules, tell the targets what has begun and what has ended, and return what holds.

    Processes that do so at once wait for each other, so that nobody is told twice.

    Args:
        config: Holds the rules; nothing is sent to a provider.
        ledger: What was asked.
        snapshot: How rungs and jobs stand.
        state: Where it is noted who was told (alerts.json, 0600).
        tell: The target `stderr`; also told, without a secret, when another target fails.
        log: Its stderr is a log, which nobody is mailed: the next one that has another tells there, too.
        patience: Seconds for each target.
    """
    from biollm.monitoring.usage import report

    rules = config.alerts
    usage = report(config, ledger, time.time() - rules.window)
    targets, now = _targets(config, tell, patience), snapshot.at
    here = {name: each for name, each in targets.items() if name != ("stderr" if log else "log")}
    state = own_dir(state)
    with locked(state / "alerts.lock"):
        at, down, kept = _load(state)
        if not now < at < now + _AHEAD:  # else somebody has looked since, while this process waited
            down = _down(down, snapshot)
            alerts = _merge(rules, kept, holding(rules, usage, snapshot, down), list(targets), now)
            _deliver(here, alerts, tell, patience)
            kept = [alert for alert in alerts if alert.pending or not alert.over]
            told = {"at": now, "down": down, "alerts": [asdict(each) for each in kept]}
            write_private(state / "alerts.json", json.dumps(told))
    return [alert for alert in kept if _holds(alert, rules.window, now)]


def firing(config: Config) -> list[str]:
    """Return what held when somebody last looked; nothing where that is over two hours ago."""
    looked, _, kept = _load(state_dir())
    fresh = time.time() - looked < _FRESH
    return [alert.text for alert in kept if fresh and _holds(alert, config.alerts.window, looked)]


def holding(rules: Alerts, usage: Report, snapshot: Snapshot, down: Mapping[str, float]) -> Iterator[Alert]:
    """Yield the rules that hold.

    Args:
        rules: What is looked for.
        usage: Of the rules' window.
        snapshot: How rungs and jobs stand.
        down: Rung -> epoch seconds since when it gives no answer.
    """
    row, lately = usage.total, f"in the last {_span(rules.window)}"
    p95, many = (row.p95_ms or 0.0) / 1000, f"{row.requests} requests"
    rates = (
        ("error_rate", rules.error_rate, row.error_rate, f"{row.error_rate:.0%} of {many} got no answer"),
        ("fallback_rate", rules.fallback_rate, row.fallback_rate,
         f"a later rung answered {row.fallback_rate:.0%} of {many}"),
        ("p95", rules.p95, p95, f"5% of {many} took over {p95:.1f} s"),
    )  # fmt: skip
    for rule, bound, value, text in rates:
        if bound is not None and value > bound and row.requests >= rules.at_least:
            yield Alert(rule, "", f"{text} {lately}")
    for quota in usage.quotas if rules.budget_share is not None else ():
        budget = quota.unit != "requests" and quota.limit.endswith(("/day", "/month"))  # others free by themselves
        if budget and quota.used >= (rules.budget_share or 0) * quota.amount:
            text = f"{quota.scope} has used {quota.used / quota.amount:.0%} of {quota.limit}"
            yield Alert("budget_share", f"{quota.scope} {quota.limit}", text)
    for candidate in snapshot.rungs if rules.down is not None else ():
        lasts = snapshot.at - down.get(candidate.deployment, snapshot.at)
        if candidate.deployment in down and lasts >= (rules.down or 0):
            yield Alert(
                "down",
                candidate.deployment,
                f"{candidate.deployment} gives no answer for {_span(lasts)}: {candidate.why}",
            )
    for job in snapshot.jobs:
        if rules.job_failed and job.phase == "failed" and not job.reason.startswith("CANCELLED"):
            yield Alert("job_failed", job.job, f"job {job.job} ({job.models}) failed: {job.reason}")
        if rules.expires is not None and job.phase == "ready" and job.left_s is not None and job.left_s < rules.expires:
            later = [each for each in snapshot.jobs if each.phase == "ready" and (each.left_s or 0.0) > job.left_s]
            if set(job.models.split(", ")) - {model for each in later for model in each.models.split(", ")}:
                yield Alert(
                    "expires", job.job, f"the server of {job.models} (job {job.job}) ends in {_span(job.left_s)}"
                )


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _down(before: Mapping[str, float], snapshot: Snapshot) -> dict[str, float]:
    """Return since when each rung that fails or rests was never seen well, nor gave an answer."""
    failing = [candidate for candidate in snapshot.rungs if candidate.state in _DOWN]
    answered = {
        candidate.deployment: snapshot.at - candidate.last_s for candidate in failing if candidate.last_s is not None
    }
    names = [candidate.deployment for candidate in failing]
    return {name: max(before.get(name, snapshot.at), answered.get(name, 0.0)) for name in names}


def _merge(
    rules: Alerts, before: Sequence[Alert], found: Iterator[Alert], targets: Sequence[str], now: float
) -> list[Alert]:
    """Return what was known and what is new, with who is to be told of it. What no rule asks for is forgotten."""
    new, merged = {(alert.rule, alert.about): alert for alert in found}, list[Alert]()
    for old in before:
        alert = new.pop((old.rule, old.about), None)
        bound = getattr(rules, old.rule, None)
        if bound is None or bound is False:  # 0 is a bound
            continue
        if alert is None and old.rule == "job_failed":  # it has not mended: Slurm is slow to tell, or has forgotten it
            if now - old.since < _FORGOTTEN:
                merged.append(old)
            continue
        if alert:
            old.text = alert.text
        if (alert is None) != old.over:  # who has not been told of the last change need not know of this one
            old.over, old.since = not old.over, now
            old.pending = [each for each in targets if each not in old.pending]
        old.pending = [each for each in old.pending if each in targets and now - old.since < _KEEP]
        merged.append(old)
    for alert in new.values():
        alert.since, alert.pending = now, list(targets)
        merged.append(alert)
    return merged


def _holds(alert: Alert, window: float, now: float) -> bool:
    """A failed job is listed for days: it is news for one window."""
    return not alert.over and (alert.rule != "job_failed" or now - alert.since < window)


def _load(state: Path) -> tuple[float, dict[str, float], list[Alert]]:
    """Return when somebody looked, since when which rungs are down, and what was known."""
    try:
        told = json.loads((own_dir(state) / "alerts.json").read_text())
        return told["at"], told["down"], [known(Alert, each) for each in told["alerts"]]
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0, {}, []


def _deliver(targets: Mapping[str, Target], alerts: Sequence[Alert], tell: Told, patience: float) -> None:
    """Tell every target what is pending there, all at once; who fails or hangs keeps it pending."""
    running: dict[str, threading.Thread] = {}
    failures: dict[str, str] = {}
    for name, target in targets.items():
        if waiting := [alert for alert in alerts if name in alert.pending]:
            running[name] = threading.Thread(target=_try, args=(name, target, waiting, failures), daemon=True)
            running[name].start()
    until = time.monotonic() + patience + 1
    for name, thread in running.items():
        thread.join(max(0.0, until - time.monotonic()))
        why = f"no end after {patience:g} s" if thread.is_alive() else failures.get(name)
        if why is not None:
            tell(f"The {name} of alerts was not told: {why}. It is tried again next time.")
            continue
        for alert in alerts:
            alert.pending = [each for each in alert.pending if each != name]


def _try(name: str, target: Target, alerts: Sequence[Alert], failures: dict[str, str]) -> None:
    try:
        target(alerts)
    except Exception as error:  # its text may hold the webhook's URL
        failures[name] = str(error) if isinstance(error, _TargetError) else type(error).__name__


class _TargetError(Exception):
    """Why a target was not told, without a secret."""


def _targets(config: Config, tell: Told, patience: float) -> dict[str, Target]:
    rules, found = config.alerts, dict[str, Target]()
    if rules.stderr:
        found["stderr"] = found["log"] = partial(_say, tell)
    if rules.webhook_env or rules.webhook_file:
        found["webhook"] = partial(_webhook, rules, patience)
    if rules.command:
        secrets = {account.env_key for provider in config.providers for account in provider.accounts}
        found["command"] = partial(_command, rules.command, {*secrets, rules.webhook_env}, patience)
    return found


def _say(tell: Told, alerts: Sequence[Alert]) -> None:
    for alert in alerts:
        tell(f"ALERT  {alert}")


def _webhook(rules: Alerts, patience: float, alerts: Sequence[Alert]) -> None:
    """Post what Slack and its like take. Not with httpx, whose log names the URL."""
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    class Stay(HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
            """Follow nothing: the POST would become a GET, and count as heard."""

    who = f"biollm of {Path.home().name}@{socket.gethostname()}"
    text = html.escape("\n".join(f"{who}: {alert}" for alert in alerts), quote=False)  # Slack would obey <!channel>
    body = json.dumps({"text": text}).encode()
    asked = Request(_url(rules), body, {"Content-Type": "application/json"})  # noqa: S310 # _url admits http(s) alone
    try:
        build_opener(Stay).open(asked, timeout=patience).close()
    except HTTPError as error:
        raise _TargetError(f"it answered HTTP {error.code}") from None


def unready(config: Config) -> Iterator[Problem]:
    """Yield why the webhook's URL cannot be had, with file and line."""
    rules = config.alerts
    if key := "webhook_env" if rules.webhook_env else "webhook_file" if rules.webhook_file else None:
        try:
            _url(rules)
        except (_TargetError, OSError) as error:
            yield config.problem(f"alerts.{key}", f"cannot be told: {error}.")


def _url(rules: Alerts) -> str:
    url, where = os.environ.get(rules.webhook_env or "", ""), rules.webhook_env
    if not url and (file := rules.webhook_file):
        if not is_private(file, stat.S_ISREG):
            raise _TargetError(f"{file} must be a file that only you can read (chmod 600)")
        url, where = file.read_text().strip(), str(file)
    if not url:
        raise _TargetError(f"{where} is not set")
    if not url.startswith(("https://", "http://")):
        raise _TargetError(f"{where} does not hold a URL")
    return url


def _command(command: Sequence[str], secrets: set[str | None], patience: float, alerts: Sequence[Alert]) -> None:
    said = json.dumps([{**each.facts, "resolved": each.over} for each in alerts])
    env, quiet = {name: value for name, value in os.environ.items() if name not in secrets}, subprocess.DEVNULL
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(
            command, env=env, stdin=pipe, stdout=quiet, stderr=quiet, text=True, start_new_session=True
        )
    except OSError as error:
        raise _TargetError(f"{command[0]}: {error.strerror}") from None
    try:
        child.communicate(said, timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its children, too
        child.wait()
        raise _TargetError(f"{command[0]} had not ended after {patience:g} s") from None
    if child.returncode:
        raise _TargetError(f"{command[0]} ended with exit code {child.returncode}")
