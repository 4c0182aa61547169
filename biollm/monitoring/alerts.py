"""Reports when a rule of `alerts:` in providers.yaml begins to hold and when it ends, once to each target.

Prometheus' Alertmanager does that for those who run one. A user of a cluster has cron at best.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from biollm._files import locked, write_private
from biollm.config.paths import own_dir, state_dir
from biollm.monitoring import delivery
from biollm.monitoring.rules import Alert, down_since, holding
from biollm.types import known

if TYPE_CHECKING:
    from biollm.config import Alerts, Config
    from biollm.ledger import Ledger
    from biollm.monitoring.snapshot import Snapshot

_KEEP = 86400.0  # seconds for which a target that fails is tried again
_FRESH = 7200.0  # seconds after which the rules do not seem to be evaluated any more
_FORGOTTEN = 8 * 86400.0  # seconds; Slurm's jobs are remembered for a week
_AHEAD = 600.0  # seconds by which another node's clock may be ahead


def check(
    config: Config, ledger: Ledger, snapshot: Snapshot, state: Path, say: Callable[[str], None], *,
    log: bool = False, patience: float = delivery.PATIENCE,
) -> list[Alert]:  # fmt: skip
    """Evaluate the rules, report what has begun and what has ended to the targets, and return what holds.

    Concurrent processes wait for each other, so that nothing is reported twice. `say` is the target `stderr`, and
    reports when another fails. With `log` it writes a log, which is not mailed as cron's stderr is: it then gets what
    is new in this check, and `stderr` stays pending.
    """
    from biollm.monitoring.usage import report

    rules, now = config.alerts, snapshot.at
    usage = report(config, ledger, time.time() - rules.window)
    targets = delivery.targets(config, say, patience)
    state = own_dir(state)
    with locked(state / "alerts.lock"):
        at, down, kept = _load(state)
        if not now < at < now + _AHEAD:  # else another process has evaluated a later snapshot in the meantime
            down = down_since(down, snapshot)
            alerts = _merge(rules, kept, holding(rules, usage, snapshot, down), list(targets), now)
            if log and (stderr := targets.pop("stderr", None)):
                stderr([alert for alert in alerts if alert.since == now])
            delivery.deliver(targets, alerts, say)
            kept = [alert for alert in alerts if alert.pending or not alert.over]
            content = {"at": now, "down": down, "alerts": [asdict(each) for each in kept]}
            write_private(state / "alerts.json", json.dumps(content))
    return [alert for alert in kept if _holds(alert, rules.window, now)]


def firing(config: Config) -> list[str]:
    """Return what held at the last check; nothing if that is over two hours ago."""
    checked, _, kept = _load(state_dir())
    fresh = time.time() - checked < _FRESH
    return [alert.text for alert in kept if fresh and _holds(alert, config.alerts.window, checked)]


def _merge(
    rules: Alerts, before: Sequence[Alert], found: Iterable[Alert], targets: Sequence[str], now: float
) -> list[Alert]:
    """Return the known and the new alerts with their pending targets; those of a rule that was removed are dropped."""
    new = {(alert.rule, alert.about): alert for alert in found}
    merged: list[Alert] = []
    for old in before:
        alert, bound = new.pop((old.rule, old.about), None), getattr(rules, old.rule, None)
        if bound is None or bound is False:  # 0 is a bound
            continue
        if alert is None and old.rule == "job_failed":  # final: Slurm is slow to report it, or has forgotten it
            if now - old.since < _FORGOTTEN:
                merged.append(old)
            continue
        if alert:
            old.text = alert.text
        if (alert is None) != old.over:
            # Every message becomes out of date, but for a target that was not reached: its last one is right again.
            # (It began, the webhook failed, it ended: the webhook need not be sent either.)
            old.over, old.since = not old.over, now
            old.pending = [each for each in targets if each not in old.pending]
        old.pending = [each for each in old.pending if each in targets and now - old.since < _KEEP]
        merged.append(old)
    for alert in new.values():
        alert.since, alert.pending = now, list(targets)
    return [*merged, *new.values()]


def _holds(alert: Alert, window: float, now: float) -> bool:
    """Slurm lists a failed job for days; it is news for one window."""
    return not alert.over and (alert.rule != "job_failed" or now - alert.since < window)


def _load(state: Path) -> tuple[float, dict[str, float], list[Alert]]:
    """Return the time of the last check, since when which deployments are down, and the known alerts."""
    try:
        content = json.loads((own_dir(state) / "alerts.json").read_text())
        return content["at"], content["down"], [known(Alert, each) for each in content["alerts"]]
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0, {}, []
