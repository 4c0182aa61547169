"""The sixteen scenarios of failoverbench: biollm's verdicts beside the published ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import failover
from setting import Bar

KINDS = (failover.PASS, failover.PARTIAL, failover.SAFE, failover.FAIL)


def measure(env: Mapping[str, str]) -> tuple[list[Bar], list[str]]:
    """Play them all, which takes 90 s, and return the bars and two tables."""
    program = Path(failover.__file__)
    done = subprocess.run([sys.executable, program], env=env, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, str] = json.loads(done.stdout)

    def verdicts(scenario: str, tuning: str) -> list[str]:
        runs = product((scenario,), failover.WIRINGS, (tuning,), failover.FACES)
        return [found[failover.Play(*run).name] for run in runs]

    def column(wiring: str, tuning: str, face: str) -> tuple[int, ...]:
        count = Counter(found[failover.Play(name, wiring, tuning, face).name] for name in failover.SCENARIOS)
        return tuple(count[kind] for kind in KINDS)

    ours = {
        f"biollm, {face}, {tuning}, {wiring}": column(wiring, tuning, face)
        for tuning, face, wiring in product(reversed(failover.TUNINGS), failover.FACES, failover.WIRINGS)
    }
    least = {tuning: min(count[0] for name, count in ours.items() if tuning in name) for tuning in failover.TUNINGS}
    bars = [
        Bar("failover scenarios, tuned: not passed, of 16", 16 - least["tuned"], 0, ""),
        Bar("failover scenarios, defaults: not passed, of 16", 16 - least["defaults"], 4, ""),
        Bar("failover scenarios: failed", sum(count[3] for count in ours.values()), 0, ""),
    ]
    table = ["| | pass | partial | safe | fail |", "|---|---|---|---|---|"]
    for name, count in [*ours.items(), *((f"{name}, published", count) for name, count in failover.PUBLISHED.items())]:
        table.append(f"| {name} | {' | '.join(map(str, count))} |")
    table += ["", "| | fault of the primary | defaults | tuned |", "|---|---|---|---|"]
    for name, scenario in failover.SCENARIOS.items():
        cells = (" / ".join(dict.fromkeys(verdicts(name, tuning))) for tuning in failover.TUNINGS)
        table.append(f"| {name} | {scenario.fault} | {' | '.join(cells)} |")
    tuned = "`on_interrupt: restart` and `patience: 3` (headers `x-biollm-on-interrupt`, `x-biollm-patience`)"
    table += ["", f"Tuned: {tuned}. Published: failoverbench, methodology 0.1, September 2026."]
    return bars, table
