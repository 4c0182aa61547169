"""The picture of now tells the truth, fits its terminal, and leaves it as it was."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from picture import NOW, group, record
from provider import Loopback

from biollm._runtime import ledger
from biollm.client import get_model_client
from biollm.config import load_config
from biollm.ledger import Claim, Ledger
from biollm.monitoring.dashboard import render
from biollm.monitoring.snapshot import CandidateView, Collector, LimitUse, Minute, Snapshot

UPDATE = os.environ.get("BIOLLM_UPDATE") == "1"
RECORDING = Path(__file__).parents[2] / "examples" / "top.txt"
Write = Callable[..., Path]


def test_the_recording_in_the_examples_is_what_top_shows(waterfall: Write, tmp_path: Path) -> None:
    text = render(group(waterfall, tmp_path).snapshot(), 80, 24) + "\n"
    if UPDATE:
        RECORDING.write_text(text)
    assert text == RECORDING.read_text(), "BIOLLM_UPDATE=1 writes it"


def test_each_rung_stands_as_it_does(waterfall: Write, tmp_path: Path) -> None:
    rungs = {
        candidate.deployment.split("/")[0]: candidate
        for candidate in reversed(group(waterfall, tmp_path).snapshot().candidates)
    }
    assert {name: candidate.state for name, candidate in rungs.items()} == {
        "lightning": "limited",
        "gemini": "cooling",
        "github_copilot": "ready",
        "openai": "keyless",
        "vllm": "ready",
        "embedded": "absent",
    }
    assert rungs["gemini"].frees_s == 42
    assert rungs["gemini"].why == "HTTP 503: the model is overloaded (time given by the provider)"
    assert rungs["lightning"].quotas == (LimitUse("15/min", 15, 15),)
    assert rungs["github_copilot"].quotas == (LimitUse("30/min", 11, 30),)
    assert rungs["lightning"].frees_s == pytest.approx(41, abs=1)
    assert rungs["vllm"].last_s == pytest.approx(68.8)
    assert rungs["openai"].last_s is None


def test_an_attempt_is_seen_when_it_happens(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.refusing(), second=net.serve())
    top = Collector.of_process(load_config())
    before = top.snapshot()
    get_model_client().complete("a prompt that nobody may see")
    ledger().flush()
    after = top.snapshot()
    assert [candidate.state for candidate in before.candidates] == ["ready", "ready"]
    assert sum(minute.requests for minute in before.minutes) == 0
    assert after.candidates[0].state == "cooling"
    assert after.candidates[0].why
    assert after.candidates[1].state == "ready"
    assert after.candidates[1].last_s is not None
    assert sum(minute.requests for minute in after.minutes) == 1
    assert [minute.fallback for minute in after.minutes if minute.requests] == [1.0]
    assert "planted" not in repr(after)
    assert "nobody may see" not in repr(after)


@pytest.fixture
def quiet(waterfall: Write, tmp_path: Path) -> tuple[Collector, Ledger]:
    """A waterfall of two that nobody used, at a clock that stands still."""
    waterfall(first="http://localhost:1/v1", second="http://localhost:2/v1")
    ledger = Ledger(tmp_path / "group", clock=lambda: NOW, network=False)
    return Collector(load_config(), ledger, tmp_path / "group", clock=lambda: NOW), ledger


def test_a_minute_counts_requests_not_attempts(quiet: tuple[Collector, Ledger]) -> None:
    top, ledger = quiet
    ledger.finish(None, "", record(NOW, "fell", "first/small", 1, "failed", 300, "HTTP 500"))
    ledger.finish(None, "", record(NOW + 0.3, "fell", "second/small", 2, "ok", 700))
    ledger.finish(None, "", record(NOW, "straight", "first/small", 1, "ok", 500))
    ledger.flush()
    assert top.snapshot().minutes[-1] == Minute(2, 750, 0.5)
    ledger.finish(None, "", record(NOW - 120, "late, sent before", "first/small", 1, "ok", 100))
    ledger.finish(None, "", record(NOW, "unanswered", "second/small", 2, "failed", 100))
    ledger.flush()
    minutes = top.snapshot().minutes
    assert (minutes[-1], minutes[-3]) == (Minute(3, 750, 1 / 3), Minute(1, 100, 0.0))


def test_a_rung_whose_last_attempt_failed_is_failing_until_it_answers(quiet: tuple[Collector, Ledger]) -> None:
    top, ledger = quiet
    states: list[tuple[str, str]] = []
    for outcome, at in (("failed", -60), ("cancelled", -50), ("ok", -40)):
        ledger.finish(None, "", record(NOW + at, outcome, "first/small", 1, outcome, 0, "HTTP 500"))
        ledger.flush()
        first = top.snapshot().candidates[0]
        states.append((first.state, first.why))
    assert states == [("failing", "HTTP 500"), ("failing", "HTTP 500"), ("ready", "")]


@pytest.mark.parametrize(("sent", "state"), [(7, "limited"), (6, "cooling")])
def test_a_limit_with_no_room_for_a_whole_request_is_used_up(
    waterfall: Write, tmp_path: Path, sent: int, state: str
) -> None:
    waterfall(first={"base_url": "http://localhost:1/v1", "rate_limit": "7.5/hour"})  # half of 15, say
    config, ledger = load_config(), Ledger(tmp_path, network=False)
    claim = Claim("first/default", tuple(config.providers[0].accounts[0].limits))
    assert all(isinstance(asyncio.run(ledger.reserve(claim)), int) for _ in range(sent))  # type: ignore[arg-type]
    if sent == 6:
        ledger.cool("account:first/default", 42, "HTTP 503")
    (candidate,) = Collector(config, ledger, tmp_path).snapshot().candidates
    assert (candidate.state, candidate.quotas) == (state, (LimitUse("7.5/hour", sent, 7.5),))


def test_a_new_history_file_is_followed(quiet: tuple[Collector, Ledger], tmp_path: Path) -> None:
    top, ledger = quiet
    for number in range(3):
        ledger.finish(None, "", record(NOW, f"{number}", "first/small", 1, "ok", 1))
    ledger.flush()
    assert top.snapshot().minutes[-1].requests == 3
    ledger.close()
    for path in (tmp_path / "group").glob("history.db*"):
        path.unlink()
    ledger.finish(None, "", record(NOW, "new", "second/small", 2, "ok", 1))
    ledger.flush()
    assert top.snapshot().minutes[-1].requests == 1


@pytest.mark.slow
def test_a_controller_that_hangs_holds_up_nothing(waterfall: Write, tmp_path: Path) -> None:
    waterfall(first="http://localhost:1/v1")
    release = threading.Event()

    def jobs() -> list[object]:
        release.wait(60)
        return []

    top = Collector(load_config(), Ledger(tmp_path), tmp_path, jobs=jobs)
    began = time.monotonic()
    top.snapshot()
    top.snapshot()
    took = time.monotonic() - began
    release.set()
    assert took < 30


MANY = tuple(CandidateView(n, f"a_long_provider_name/model-{n}", "ready", "", (), None, 12) for n in range(40))
NASTY = CandidateView(
    1, "evil\033]0;x\007/\033[2Jm", "refused", "said \033[31m\r\nboo" * 30, (LimitUse("0/min", 0, 0),), 1e6, 1e7
)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60), (80, 12)])
@pytest.mark.parametrize("color", [False, True])
def test_it_fits_any_terminal(waterfall: Write, tmp_path: Path, width: int, height: int, color: bool) -> None:
    taken = group(waterfall, tmp_path).snapshot()
    crowd = replace(taken, candidates=(NASTY, *MANY), jobs=taken.jobs * 9, alerts=("a " * 200,) * 9)
    for snapshot in (taken, crowd, Snapshot(NOW, (), (), (Minute(),) * 30)):
        lines = render(snapshot, width, height, color=color).split("\n")
        plain = [re.sub(r"\033\[\d+m", "", line) for line in lines]
        assert len(lines) <= height
        assert max(map(len, plain)) <= width
        assert all(line.isprintable() for line in plain)


def test_at_80x24_every_part_is_there_whatever_the_crowd(waterfall: Write, tmp_path: Path) -> None:
    taken = group(waterfall, tmp_path).snapshot()
    text = render(replace(taken, candidates=(*taken.candidates, *MANY), jobs=taken.jobs * 9), 80, 24)
    for part in ("1  lightning/gpt-oss-20b", "cooling 42s", "████", "4711", "requests/min", "ALERT", "more"):
        assert part in text
    assert render(taken, 80).count("\n") < 24, "the usual needs no cutting"


def test_in_a_pipe_it_prints_once(waterfall: Write, biollm: Callable[..., Any]) -> None:
    waterfall(first="http://localhost:1/v1")
    ran = biollm("top")
    assert ran.code == 0
    assert ran.out.count("biollm top") == 1
    assert "\033" not in ran.out


def test_the_page_can_be_written_to_a_file(waterfall: Write, tmp_path: Path, biollm: Callable[..., Any]) -> None:
    waterfall(first="http://localhost:1/v1")
    assert biollm("top", "--html", tmp_path / "now.html").code == 0
    assert "first/small" in (tmp_path / "now.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [(b"q", 0), (b"\003", 130), (signal.SIGTERM, 143)])
def test_the_terminal_is_left_as_it_was(waterfall: Write, end: bytes | int, code: int) -> None:
    waterfall(**{f"rung{n}": "http://localhost:1/v1" for n in range(30)})
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(theirs)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-c", "from biollm.cli import main; main()", "top", "--interval", "0.2"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    seen, ready = b"", select.poll()  # select() knows no descriptor above 1023
    ready.register(ours, select.POLLIN)
    try:
        while seen.count(b"biollm top") < 2:  # drawn twice
            assert ready.poll(60_000), seen
            seen += os.read(ours, 65536)
        os.write(ours, end) if isinstance(end, bytes) else process.send_signal(end)
        while not seen.endswith(b"\033[?1049l") and ready.poll(60_000):
            seen += os.read(ours, 65536)
            if b"\033[?1049l" in seen:
                break
        assert process.wait(60) == code
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    assert b"\033[?1049h" in seen
    assert b"\033[?25h\033[?1049l" in seen
    frame = re.findall(r"\033\[H([^\033]*biollm top.*?)\033\[(?:H|\?)", seen.decode(), re.DOTALL)[0]
    lines = [re.sub(r"\033\[[\d;]*m", "", line) for line in frame.split("\r\n")]
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
