"""The sixteen scenarios of failoverbench, against a running gateway and the Python client: what each gives."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from failover import FACES, SCENARIOS, TUNINGS, WIRINGS, Play, Seen, environment, everything

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
    assert SCENARIOS[scenario].verdict(seen) == (DEFAULTS.get(scenario, "pass") if tuning == "defaults" else "pass"), (
        seen
    )
