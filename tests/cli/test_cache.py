"""`complete --cache`, and the commands that show and clear what it stored."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from provider import Loopback, Server

Biollm = Callable[..., Ran]
Waterfall = Callable[..., Path]


@pytest.fixture
def server(net: Loopback, waterfall: Waterfall) -> Server:
    made = net.serve()
    made.answer = lambda _: {"role": "assistant", "content": f"answer {len(made.completions)}"}
    waterfall({"cache": {"ttl": "12h", "max_mb": 50}}, first=made)
    return made


def test_cache_and_no_cache(server: Server, biollm: Biollm) -> None:
    given = [["--cache"], ["--cache"], ["--no-cache"], [], ["--cache", "--stream"], ["--cache", "--json"]]
    ran = [biollm("complete", "why?", *options) for options in given]
    assert [each.out for each in ran[:5]] == [f"answer {number}\n" for number in (1, 1, 2, 3, 1)]
    assert ran[0].err.splitlines()[-1].startswith("— first/small, ")
    assert ran[1].err.splitlines()[-1] == "— stored answer of first/small, 0.0 s, 1 + 2 tokens, free"
    assert (ran[5].json["cached"], ran[5].json["cost_usd"], ran[5].json["text"]) == (True, 0, "answer 1")


def test_the_same_failure_of_another_run(server: Server, biollm: Biollm, tmp_path: Path) -> None:
    for sample, job in (("tumor_7", 4711), ("liver_2", 99)):
        (tmp_path / f"{sample}.log").write_text(f"JOB {job} ON node{job} CANCELLED\n{sample}: exit status 137\n")

    def ask(sample: str, *options: str) -> Ran:
        return biollm("complete", "why?", "-f", tmp_path / f"{sample}.log", "--cache-similar", *options)

    assert ask("tumor_7", "--cache-name", "tumor_7").out == "answer 1\n"
    other = ask("liver_2", "--cache-name", "liver_2")
    assert other.out == "answer 1\n"
    assert "for a similar request: why?; tumor_7.log: JOB 4711 ON node4711 CANCELLED\n" in other.err
    assert ask("liver_2").out == "answer 2\n"
    both = ask("liver_2", "--no-cache")
    assert (both.code, "--cache-similar uses the cache, and --no-cache does not." in both.err) == (2, True)
    assert len(server.completions) == 2


def test_options_without_effect_are_reported(server: Server, biollm: Biollm) -> None:
    assert (
        "--cache-name has no effect without --cache-similar.\n" in biollm("complete", "why?", "--cache-name", "a").err
    )
    assert "The cache is not used with --ensemble.\n" in biollm("complete", "why?", "--cache", "--ensemble", "2").err


def test_what_an_answer_of_unknown_price_saved_is_not_called_zero(server: Server, biollm: Biollm) -> None:
    for _ in range(2):
        biollm("complete", "why?", "--cache")
    assert "\nStored answers: 1, which saved 3 tokens.\n" in biollm("usage").out
    assert "biollm_saved_cost_usd_total{" not in biollm("usage", "--prometheus").out
    assert biollm("cache", "clear").out == "1 answer deleted.\n"


def test_show_and_clear(server: Server, biollm: Biollm, state: Path) -> None:
    empty = biollm("cache", "show")
    assert (empty.code, empty.out) == (0, f"0 answers of the last 12 h, 0.0 of 50 MB: {state / 'cache.db'}\n")
    assert biollm("cache", "clear").out == "0 answers deleted.\n"
    for question in ("why?", "and why not?"):
        biollm("complete", question, "--cache")
    shown = biollm("cache", "show").out.splitlines()
    assert shown[0].startswith("2 answers of the last 12 h, 0.0 of 50 MB: ")
    assert shown[2].split() == ["made", "(UTC)", "deployment", "for"]
    assert [line.split("  ")[1:] for line in shown[3:]] == [["first/small", "and why not?"], ["first/small", "why?"]]
    facts = biollm("cache", "show", "--json", "-n", "1").json
    assert (facts["answers"], facts["ttl_s"], facts["max_mb"], facts["file"]) == (2, 43200, 50, str(state / "cache.db"))
    assert [(each["about"], each["deployment"]) for each in facts["newest"]] == [("and why not?", "first/small")]
    assert biollm("usage").out.count("Stored answers") == 0
    assert biollm("cache", "clear").out == "2 answers deleted.\n"
    assert biollm("complete", "why?", "--cache").out == "answer 3\n"


def test_a_file_that_is_locked_is_reported(server: Server, biollm: Biollm, state: Path) -> None:
    biollm("complete", "why?", "--cache")
    with sqlite3.connect(state / "cache.db") as db:
        db.execute("BEGIN EXCLUSIVE")
        ran = biollm("cache", "clear")
    assert (ran.code, ran.err.splitlines()[0]) == (
        2,
        f"biollm: {state / 'cache.db'} cannot be used: database is locked.",
    )
