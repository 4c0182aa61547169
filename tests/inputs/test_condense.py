"""A log of any length becomes an excerpt that fits, and keeps the line that names the cause."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from logs import LOGS, Log, memory

from biollm.client import condense
from biollm.inputs.condense import scan
from biollm.inputs.digest import WINDOW
from biollm.inputs.read import read_input
from biollm.inputs.tokens import estimate

MARK = re.compile(r"\[\.\.\. ([\d,]+) (?:lines? left out|more lines like the one above) \.\.\.\]")


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


SEEDS = range(60)
WORDS = (
    "Killed",
    "error: x",
    "WARN slow",
    "ok",
    "",
    "  indented",
    "exit status 137",
    "0 errors",
    "日本語 ✓",
    "x" * 3000,
    "step 12",
    "step 13",
)


def random_log(seed: int) -> str:
    r = random.Random(seed)
    lines = [r.choice(WORDS) + r.choice(("", f" {r.randrange(50)}", "\t")) for _ in range(r.randrange(2000))]
    return "\n".join(lines) + r.choice(("", "\n"))


@pytest.mark.parametrize("seed", SEEDS)
def test_an_excerpt_fits_its_budget_and_is_whole_lines_in_order(seed: int) -> None:
    text = random_log(seed)
    source = text.split("\n")
    digest = scan([text.encode()], "x")
    for tokens in (0, 5, 20, 100, 300, 2_000, 20_000, 200_000):
        cut = digest.cut(tokens)
        assert estimate(cut.text) == cut.tokens <= tokens
        assert cut.lines == len(text.splitlines() if text.isascii() else text.split("\n")) - (
            not text.isascii() and text.endswith("\n")
        )
        if cut.whole:
            assert cut.text == text
            continue
        at = kept = marked = 0
        for line in cut.text.split("\n")[:-1]:
            if mark := MARK.fullmatch(line):
                marked += int(mark[1].replace(",", ""))
                at += int(mark[1].replace(",", ""))
            elif " characters left out ...] " in line:
                assert source[at].startswith(line[:20])
                at, kept = at + 1, kept + 1
            else:
                assert line == source[at]
                at, kept = at + 1, kept + 1
        assert kept == cut.kept
        assert not cut.text or kept + marked == cut.lines


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_the_chunks_of_a_stream_do_not_matter(seed: int) -> None:
    data = random_log(seed).replace("\n", "\r\n" if seed % 2 else "\r").encode()
    chunks = [data[at : at + seed + 1] for at in range(0, len(data), seed + 1)]
    assert scan(chunks, "x") == scan([data], "x")


def test_more_tokens_show_more() -> None:
    digest = scan(LOGS[0].chunks(), "x")
    kept = [digest.cut(tokens).kept for tokens in (300, 3_000, 30_000, 300_000)]
    assert kept == sorted(kept)
    assert digest.cut(3_000) == scan(LOGS[0].chunks(), "x").cut(3_000)


def test_repeated_lines_are_folded_with_their_number_to_the_first_and_the_last() -> None:
    text = "start\n" + "".join(f"10:00:{n % 60:02d} read {n} of 900\n" for n in range(900)) + "Killed\n"
    assert condense(text, tokens=100) == (
        "start\n10:00:00 read 0 of 900\n[... 898 more lines like the one above ...]\n10:00:59 read 899 of 900\nKilled\n"
    )


def test_what_was_condensed_already_is_counted_as_what_it_was() -> None:
    text = "".join(f"line {'abcxyz'[n * 7 % 6]}{'uvwxyz'[n * 5 % 6]} {n}\n" for n in range(50_000)) + "Killed\n"
    digest = scan([text.encode()], "x")
    for tokens in (2_000, 90_000):
        once = digest.cut(tokens)
        twice = scan([once.text.encode()], "x").cut(200)
        assert (once.lines, twice.lines) == (50_001, 50_001)
        at = 0
        for line in twice.text.splitlines():
            if mark := MARK.fullmatch(line):
                at += int(mark[1].replace(",", ""))
            else:
                assert line == text.split("\n")[at]
                at += 1
        assert at == 50_001


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_a_carriage_return_ends_a_line(end: str) -> None:
    cut = scan([f"one{end}two{end}three".encode()], "x").cut(100)
    assert (cut.text, cut.lines) == ("one\ntwo\nthree", 3)


def test_a_window_does_not_end_inside_a_line_end() -> None:
    text = "x" * (WINDOW - 1) + "\r\n" + "y\n" * 20_000
    assert scan([text.encode()], "x").lines == 20_001


def test_the_first_failure_and_the_last_are_kept_before_many_causes() -> None:
    causes = [f"{one}{two}{three}: No such file" for one in "ghij" for two in "klmn" for three in "opqrstuv"]
    fine = "fine\nwell\n" * 500
    text = f"{fine}ERROR: the first\n{fine}" + "\n".join(causes) + f"\n{fine}ERROR: the last\n{fine}"
    kept = condense(text, tokens=200)
    assert "ERROR: the first\n" in kept
    assert "ERROR: the last\n" in kept


def test_escape_sequences_go() -> None:
    coloured = "\x1b[1;31mERROR\x1b[0m \x1b]8;;http://x\x1b\\link\x1b]8;;\x07\x1b[K\x1b[?25l done\n"
    assert condense(coloured) == "ERROR link done\n"


def test_a_long_line_is_cut_around_its_find() -> None:
    line = "a " * 50_000 + "No space left on device" + " b" * 50_000
    cut = scan([f"first\n{line}\n".encode()], "x").cut(1_000)
    assert "No space left on device" in cut.text
    assert len(cut.text) < 1_200
    assert "characters left out" in cut.text


@pytest.mark.parametrize(
    "decoy",
    [
        "error_rate=0.01",
        "0 errors",
        "--errorStrategy retry",
        "exit: 0; error: -;",
        "no failures",
        "failed=0",
        "exit code: 0",
    ],
)
def test_a_line_that_only_looks_like_a_failure_does_not_push_one_out(decoy: str) -> None:
    lines = [f"{n} {decoy} {'pqrstu'[n % 6]}" for n in range(4000)]
    lines[1234] = "ERROR: no reads were mapped"
    assert "no reads were mapped" in condense("\n".join(lines), tokens=300)


def test_the_first_failure_and_the_last_come_before_those_between() -> None:
    names = [f"{one}{two}" for one in "ghijklmnop" for two in "ghijklmnop"]
    text = "".join(f"ERROR: step {name} failed\n" + "fine\nwell\n" * 20 for name in names)
    kept = re.findall(r"step (\w+) failed", condense(text, tokens=300))
    assert {"gg", "pp"} <= set(kept)


@pytest.mark.parametrize("megabytes", [0.2, 1, 3, 9])
def test_the_beginning_and_the_end_are_kept(megabytes: float) -> None:
    lines = [f"line {n} {'abcdef'[n % 6] * 9}" for n in range(int(megabytes * 40_000))]
    cut = scan(["\n".join(lines).encode()], "x").cut(1_000)
    assert cut.text.startswith(lines[0] + "\n")
    assert cut.text.endswith(lines[-1] + "\n")


def test_a_context_larger_than_what_is_kept_gets_all_of_it() -> None:
    cut = scan(LOGS[0].chunks(), "x").cut(100_000_000)
    assert not cut.whole
    assert len(cut.text) > 4_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "megabytes"),
    [
        ("10:00 step 12 of 900 is done\n", 1000),
        ("mapping 12%\r", 1000),
        ("one line", 1000),
        ("ERROR 12 failed\n", 100),
        ("café Killed ", 100),
        ("café\n", 100),
    ],
)
def test_a_gigabyte_takes_less_than_a_hundred_megabytes(line: str, megabytes: int) -> None:
    assert memory(line, megabytes) < 100
