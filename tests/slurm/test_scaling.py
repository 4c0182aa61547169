"""When a server is started or stopped: the decision as a table, then a day and 1,000 random days in the simulator."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from biollm.config import Scale
from biollm.slurm.scaling import Delays, Look, decide, measured

DAY: Any = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "autoscale_day.py"))
FULL = Look(0, ready=1, running=8, waiting=5, slots=8)
EMPTY = Look(0)
LOST = Look(0, unserved=2, unserved_s=30)
IDLE = Look(0, ready=1, slots=8)


def over(seconds: float, look: Look, every: float = 10.0) -> list[Look]:
    """The same figures for so many seconds, until the time 10,000."""
    return [replace(look, at=10_000 - seconds + step * every) for step in range(int(seconds / every) + 1)]


@pytest.mark.parametrize(
    ("looks", "more", "change", "line"),
    [
        (over(30, FULL), {}, 1, "scaled up to 2: 8 running and 5 waiting at 1 server"),
        (over(20, FULL), {}, 0, "not scaled: 8 running and 5 waiting at 1 server, for less than 30 s"),
        ([replace(IDLE, at=9_990), *over(20, FULL)], {}, 0, "not scaled: 8 running and 5 waiting at 1 server, for less than 30 s"),
        (over(60, FULL, every=60), {}, 1, "scaled up to 2: 8 running and 5 waiting at 1 server"),
        (over(30, replace(FULL, waiting=1)), {}, 0, "enough: 8 running and 1 waiting at 1 server"),
        (over(0, LOST), {}, 1, "scaled up to 1: 2 requests found no server in 2 min"),
        (over(0, replace(LOST, unserved=1, unserved_s=0)), {}, 0, "not scaled: 1 request found no server in 2 min, for less than 30 s"),
        (over(0, EMPTY), {}, 0, "enough: 0 running and 0 waiting at 0 servers"),
        (over(0, replace(EMPTY, budget="10 USD/day of openai/default ends in 12 min")), {}, 1,
         "scaled up to 1: 10 USD/day of openai/default ends in 12 min"),
        (over(0, EMPTY), {"min": 1}, 1, "scaled up to 1: min is 1"),
        (over(30, replace(LOST, coming=2)), {}, 0, "not scaled: 2 jobs pending or starting"),
        (over(30, replace(FULL, coming=1)), {}, 0, "not scaled: 1 job pending or starting"),
        (over(30, replace(FULL, coming=1, waiting=50)), {}, 1, "scaled up to 3: 8 running and 50 waiting at 1 server"),
        (over(30, replace(FULL, ready=3, running=24)), {}, 0, "not scaled: 24 running and 5 waiting at 3 servers, max is 3"),
        (over(30, FULL), {"stopped": 9_820.0}, 0, "not scaled: a server was stopped 3 min ago, less than 10 min"),
        (over(30, FULL), {"stopped": 9_400.0}, 1, "scaled up to 2: 8 running and 5 waiting at 1 server"),
        (over(0, EMPTY), {"min": 1, "stopped": 9_999.0}, 0, "not scaled: a server was stopped 1 s ago, less than 10 min"),
        ([replace(FULL, at=9_970, waiting=20), replace(FULL, at=10_000, waiting=10)], {"starts_in": 300.0}, 0,
         "not scaled: the backlog drains in 30 s, a server would answer in 5 min"),
        ([replace(FULL, at=9_970, waiting=20), replace(FULL, at=10_000, waiting=10)], {"starts_in": 20.0}, 1,
         "scaled up to 2: 8 running and 10 waiting at 1 server"),
        (over(30, FULL), {"starts_in": 86_400.0}, 1, "scaled up to 2: 8 running and 5 waiting at 1 server"),
        (over(30, FULL), {"broken": "job 7 has failed: no weights"}, 0, "not scaled: job 7 has failed: no weights"),
        (over(600, IDLE), {}, -1, "scaled down to 0: quiet for 10 min"),
        (over(590, IDLE), {}, 0, "enough: 0 running and 0 waiting at 1 server"),
        (over(600, IDLE), {"min": 1}, 0, "enough: 0 running and 0 waiting at 1 server"),
        (over(600, replace(IDLE, running=1)), {}, 0, "enough: 1 running and 0 waiting at 1 server"),
        ([*over(600, IDLE)[:-1], replace(IDLE, at=10_000, running=1)], {}, 0, "enough: 1 running and 0 waiting at 1 server"),
        (over(600, replace(IDLE, ready=2, running=6)), {}, -1, "scaled down to 1: quiet for 10 min"),
        (over(600, replace(IDLE, ready=2, running=7)), {}, 0, "enough: 7 running and 0 waiting at 2 servers"),
        (over(600, replace(EMPTY, coming=1)), {}, -1, "scaled down to 0: quiet for 10 min"),
        (over(600, replace(IDLE, budget="10 USD/day of openai/default ends in 2 min")), {}, 0,
         "enough: 10 USD/day of openai/default ends in 2 min"),
    ],
)  # fmt: skip
def test_the_decision(looks: list[Look], more: dict[str, Any], change: int, line: str) -> None:
    scale = Scale(min=more.pop("min", 0), max=3)
    decision = decide(scale, looks, Delays(), **more)
    assert (decision.change, decision.line) == (change, line)


def test_figures_are_summed_and_the_slots_of_a_full_server_are_learned() -> None:
    first = measured(100, [(8, 4), (3, 0), None], 1, [60.0, 95.0], [])
    assert first == Look(100, 3, 1, 11, 4, unserved=2, unserved_s=35, slots=8)
    assert measured(110, [(2, 0)], 0, [], [first]).slots == 8
    assert measured(110, [(0, 1)], 0, [], [first]).slots == 4  # a request that came this moment
    assert measured(110, [(9, 1)], 0, [], [first]).slots == 9


def test_the_example_day_waits_half_as_long_at_no_more_than_a_fifth_more_gpu_hours() -> None:
    site, day = DAY["Site"](), DAY["DAY"]
    fixed, scaled = (DAY["replay"](day, scale, site, Random(1)) for scale in (None, Scale(max=3)))
    assert scaled.waiting <= fixed.waiting / 2
    assert scaled.gpu_hours <= 1.2 * fixed.gpu_hours
    assert fixed.gpu_hours == pytest.approx(24)
    assert len(scaled.waits) + scaled.cloud == pytest.approx(
        sum(day), abs=30
    )  # the last ones are under way at midnight
    assert scaled.cloud < 0.01 * sum(day)


@pytest.mark.slow
def test_no_server_starts_within_ten_minutes_of_a_stop_in_a_thousand_random_days() -> None:
    ups = downs = 0
    for seed in range(1000):
        chance = Random(seed)
        site = DAY["Site"](
            slots=chance.choice((1, 2, 8, 64)), service=chance.uniform(2, 120), queue=chance.choice((0, 60, 600, 7200)),
            load=chance.uniform(10, 900), walltime=chance.uniform(0.5, 24) * 3600, every=chance.choice((30, 60, 120)),
        )  # fmt: skip
        busy = chance.choice((5, 50, 300)) * chance.random()
        day = [int(chance.expovariate(1 / busy)) if chance.random() < 0.6 else 0 for _ in range(24)]
        scale = Scale(
            min=chance.choice((0, 0, 1)), max=chance.choice((1, 2, 4)), target_waiting=chance.choice((0, 1, 5))
        )
        out = DAY["replay"](day, scale, site, chance)
        last_down = -1e9
        for at, change in out.changes:
            assert change < 0 or at - last_down >= 600, f"seed {seed}: up {at - last_down:.0f} s after a stop"
            last_down = at if change < 0 else last_down
            ups, downs = ups + (change > 0), downs + (change < 0)
        assert out.most <= scale.max
    assert min(ups, downs) > 1000
