"""A log of any length becomes an excerpt that fits, and keeps the line that names the cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from logs import LOGS, Log

from biollm.client import condense
from biollm.inputs.condense import scan
from biollm.inputs.read import read_input
from biollm.inputs.tokens import estimate


def test_a_text_that_fits_stays_as_it_is() -> None:
    text = "one\ntwo, Grüße\n\nlast without an end"
    cut = scan([text.encode()], "x").cut(100)
    assert (cut.text, cut.lines, cut.kept, cut.whole) == (text, 4, 4, True)


def test_a_file_is_condensed_to_its_budget_around_its_error(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {n} is fine\n" for n in range(5000)) + "Killed\n" + "more of it\n" * 5000)
    assert "\nKilled\n" in condense(log, tokens=1000)
    cut = read_input(log).digest.cut(1000)
    assert cut.tokens == estimate(cut.text) <= 1000
    assert not cut.whole
    assert cut.lines == 10001 > cut.kept


@pytest.mark.slow
@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
def test_the_line_that_names_the_cause_is_kept(log: Log) -> None:
    digest = scan(log.chunks(), log.name)
    for tokens in (300, 8_000, 32_000, 128_000):
        cut = digest.cut(tokens)
        assert cut.tokens == estimate(cut.text) <= tokens
        assert log.names_cause in cut.text, tokens
