"""The sixteen scenarios of failoverbench, against a running gateway and the Python client: what each gives."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from failover import (
    FACES,
    REFUSES_PREFILL,
    SCENARIOS,
    TEXT,
    TUNINGS,
    WIRINGS,
    Call,
    Play,
    Seen,
    environment,
    everything,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module", autouse=True)
def state() -> Iterator[dict[str, Seen]]:
    """What happened in every run; they take 80 s together."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("BIOLLM_") or name.lower().endswith("_proxy"):
                patch.delenv(name)
        for name, value in environment(Path(folder)).items():
            patch.setenv(name, value)
        yield {play.name: seen for play, seen in everything(Path(folder)).items()}


GOOD, LATE = Call(TEXT, "", 0.0, 1.0), Call(TEXT, "", 0.0, 101.0)
CUT, ERROR = Call(TEXT[:40], "", 0.0, 1.0), Call(TEXT[:40], "it broke", 0.0, 1.0)
REFUSED, PREFILL = Call("", SCENARIOS["S13"].reason, 0.0, 1.0), Call("", REFUSES_PREFILL, 0.0, 1.0)


@pytest.mark.parametrize(
    ("scenario", "calls", "asked", "failure"),
    [
        ("S04", [GOOD], [0, 0.1], "pass"), ("S04", [GOOD], [0] * 7, "fail"), ("S04", [CUT], [0], "fail"),
        ("S04", [ERROR], [0], "safe"), ("S04", [LATE], [0], "fail"), ("S03", [GOOD], [0], "partial"),
        ("S01", [GOOD], [0, 1.9], "pass"), ("S01", [GOOD], [0, 1.0], "partial"), ("S01", [GOOD], [0, 1, 1.2], "fail"),
        ("S09", [ERROR, GOOD], [0], "safe"), ("S09", [ERROR, ERROR], [0], "fail"),
        ("S13", [REFUSED], [0], "pass"), ("S13", [ERROR], [0], "safe"), ("S13", [GOOD], [0], "partial"),
        ("S13", [REFUSED], [0, 1], "fail"), ("S14", [PREFILL], [0], "fail"), ("S14", [ERROR], [0], "safe"),
        ("S15", [GOOD] * 20, [0], "fail"), ("S16", [GOOD], [0], "fail"),
    ],
)  # fmt: skip
def test_a_verdict_is_what_the_benchmark_says(
    scenario: str, calls: list[Call], asked: list[float], failure: str
) -> None:
    assert SCENARIOS[scenario].failure(Seen(calls, asked, "primary", "fallback")) == failure


# With the defaults no 429 is waited out, and a stream that broke after some text ends with an error.
DEFAULTS = {"S01": "partial", "S08": "safe", "S09": "safe", "S14": "safe"}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_ends_as_it_should(
    state: dict[str, Seen], scenario: str, wiring: str, tuning: str, face: str
) -> None:
    seen = state[Play(scenario, wiring, tuning, face).name]
    assert SCENARIOS[scenario].failure(seen) == (DEFAULTS.get(scenario, "pass") if tuning == "defaults" else "pass"), (
        seen
    )
