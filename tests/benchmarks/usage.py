"""`biollm usage` over a million records, and what a ledger write costs a completion, alone and with 16 processes."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import bench_ledger
from setting import ROUNDS, Bar

from biollm.ledger import Ledger, attempts, history

RECORDS = 1_000_000
DAYS = 90
RUNGS = (
    ("gemini", "default", "flash"),
    ("lightning", "default", "gpt-oss-20b"),
    ("vllm", "default", "qwen"),
    ("openai", "lab", "mini"),
)


def _rows(count: int, end: float) -> Iterator[tuple[object, ...]]:
    """Yield attempts of 90 days: four accounts, three agents, 3% failures."""
    dice = random.Random(1)
    tags = [json.dumps({"agent": agent}) for agent in ("ErrorDiagnosis", "Reviewer", "Planner")]
    for number in range(count):
        place = 0 if dice.random() < 0.7 else dice.randrange(1, 4)
        provider, account, model = RUNGS[place]
        bad = dice.random() < 0.03
        outcome, status = ("failed", 429) if bad else ("ok", None)
        reason = "HTTP 429: slow" if bad else "limited: 15/min used" if place else ""
        times = dice.lognormvariate(6.5, 0.8), dice.lognormvariate(5, 0.5)
        tokens = (0, 0, None) if bad else (800, 150, 0.001)
        yield (end - DAYS * 86400 * (1 - number / count), f"r{number}", f"{provider}/{model}", provider, account,
               model, outcome, reason, status, *times, *tokens, place + 1, 0, 0, tags[number % 3])  # fmt: skip


def million(scratch: Path, env: Mapping[str, str]) -> list[Bar]:
    """Measure the command from the start of its process, once its records are rolled up."""
    state = scratch / "usage"
    ledger = Ledger(state)
    ledger.change(lambda db: db.executemany(attempts.ADD, _rows(RECORDS, time.time())) and None)
    began = time.perf_counter()
    history.roll(ledger)
    rolled = time.perf_counter() - began
    command = [str(Path(sys.executable).with_name("biollm")), "usage", "--since", "100d", "--json"]
    seconds: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        done = subprocess.run(command, env={**env, "BIOLLM_STATE_DIR": str(state)}, capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
        assert json.loads(done.stdout)["total"]["requests"] == RECORDS
    note = f"its process included; rolled up once before, in {rolled:.1f} s"
    return [Bar("`biollm usage` over 1,000,000 records", statistics.median(seconds) * 1000, 1000, "ms", note)]


def writes() -> list[Bar]:
    """Measure a completion's reserve and finish; what 16 processes wait and lose, in both journal modes."""
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:  # a local disk's journal; the section below has the other's, too
        costs = bench_ledger.alone(Path(folder), network=False)[1]
    bars.append(Bar("ledger: a completion's writes, median", statistics.median(costs), 0.5, "ms"))
    for name, network in (("WAL", False), ("rollback journal", True)):
        with tempfile.TemporaryDirectory() as folder:
            waits, kept, expected = bench_ledger.together(Path(folder), network, 0.0)
        p99 = sorted(waits)[int(len(waits) * 0.99)]
        bars.append(Bar(f"ledger ({name}), 16 processes at once: wait, p99", p99, 50, "ms"))
        bars.append(Bar(f"ledger ({name}), 16 processes at once: records lost", expected - kept, 0, ""))
    return bars


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for bar in (*million(Path(folder), os.environ), *writes()):
            print(bar.row())
