"""Answers are rated; their prompts are kept only where the configuration says so, and no longer."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import HTTP_500
from conftest import until
from provider import Json, Loopback

from biollm._runtime import ledger, ratings
from biollm.client import Client, UsageError, get_model_client
from biollm.ledger.ratings import FILE, Ratings

Write = Callable[..., Path]
KEEP = {"store_rated": "7d"}


def client(net: Loopback, waterfall: Write, top: Json) -> Client:
    waterfall(top, first=net.serve(text="out of memory"))
    return get_model_client(sender="direct")


def kept(state: Path) -> list[Any]:
    ratings().close()
    return list(Ratings(state).rated())


def test_a_rated_answer_is_kept_with_its_prompt_and_correction(net: Loopback, waterfall: Write, state: Path) -> None:
    asking = client(net, waterfall, KEEP)
    answer = asking.complete("Why?", system="Be brief.", attachments=["exit 137"], tags={"agent": "a"})
    assert asking.rate(answer, "down", correction="disk full") is True
    (found,) = kept(state)
    assert [each["role"] for each in found.messages] == ["system", "user"]
    assert "exit 137" in found.messages[1]["content"] and "Why?" in found.messages[1]["content"]
    assert (found.id, found.answer, found.rating, found.correction) == (answer.id, "out of memory", "down", "disk full")
    assert (found.model, found.tags, found.local_only) == ("small", {"agent": "a"}, False)
    assert stat.S_IMODE((state / FILE).stat().st_mode) == 0o600


def test_a_rating_replaces_the_one_before(net: Loopback, waterfall: Write, state: Path) -> None:
    asking = client(net, waterfall, KEEP)
    answer = asking.complete("Why?")
    asking.rate(answer, "down", correction="no")
    asking.rate("last", "up")
    assert [(each.rating, each.correction) for each in kept(state)] == [("up", None)]


def test_a_second_rating_keeps_the_correction(net: Loopback, waterfall: Write, state: Path, biollm: Any) -> None:
    asking = client(net, waterfall, KEEP)
    answer = asking.complete("Why?")
    asking.rate(answer, "down", correction="disk full")
    for correction, expected in ((None, "disk full"), ("no disk", "no disk")):
        asking.rate(answer, "down", correction=correction)
        assert [each.correction for each in kept(state)] == [expected]
    assert biollm("rate", answer.id, "up").out == f"{answer.id}: rated up. Its correction is removed.\n"
    assert biollm("rate", answer.id, "up").out == f"{answer.id}: rated up.\n"


def test_the_last_answer_of_an_ensemble_is_its_result(
    net: Loopback, waterfall: Write, state: Path, biollm: Any
) -> None:
    judge = net.serve(text=json.dumps({"answer": 1, "reason": "?"}))
    members = {f"m{at}": net.serve(text=text) for at, text in enumerate(("one", "two"))}
    waterfall(KEEP, **members, j={"base_url": judge.url, "models": ["judge"]})
    asking = get_model_client(sender="direct")
    answer = asking.ensemble("Why?", members=["m0/small", "m1/small"], judge="judge")
    asking.rate("last", "up")
    assert [(each.id, each.answer, each.messages[-1]["content"]) for each in kept(state)] == [
        (answer.id, "one", "Why?")
    ]
    assert b"Below are 2 answers" not in b"".join(path.read_bytes() for path in state.iterdir() if path.is_file())
    asking.complete("And now?", provider="m1")
    ledger().flush()
    assert answer.id not in biollm("rate", "last", "up").out


def test_a_vote_is_kept_as_it_was_shown(net: Loopback, waterfall: Write, state: Path) -> None:
    texts = [json.dumps({"a": a, "b": b, "c": c}) for a, b, c in ((1, 1, 2), (1, 2, 1), (3, 1, 1))]
    waterfall(KEEP, **{f"m{at}": net.serve(text=text) for at, text in enumerate(texts)})
    asking = get_model_client(sender="direct")
    number = {"type": "integer"}
    schema = {"type": "object", "properties": dict.fromkeys("abc", number), "required": ["a", "b", "c"]}
    answer = asking.ensemble("Why?", members=3, response_model=schema)
    assert answer.parsed == {"a": 1, "b": 1, "c": 1}, "none of the members gave this"
    asking.rate("last", "up")
    assert [(each.id, each.answer) for each in kept(state)] == [(answer.id, answer.text)]


def test_the_last_answer_may_be_a_stored_one(net: Loopback, waterfall: Write, state: Path) -> None:
    asking = client(net, waterfall, KEEP)
    first = asking.complete("one", cache=True)
    asking.complete("two")
    assert asking.complete("one", cache=True).id == first.id
    asking.rate("last", "up")
    assert [each.id for each in kept(state)] == [first.id]


POLICIES = [
    # top of providers.yaml, options of the call, whether prompt and answer are kept
    ({}, {}, False),
    (KEEP, {}, True),
    (KEEP, {"local_only": True}, False),
    (KEEP | {"store_rated_local": True}, {"local_only": True}, True),
    (KEEP | {"data_policy": "local_only"}, {}, False),
    ({"store_rated_local": True}, {"local_only": True}, False),
]


@pytest.mark.parametrize(("top", "options", "stored"), POLICIES)
def test_nothing_is_kept_unless_the_configuration_says_so(
    net: Loopback, waterfall: Write, state: Path, top: Json, options: Json, stored: bool
) -> None:
    asking = client(net, waterfall, top)
    answer = asking.complete("a secret prompt", **options)
    assert asking.rate(answer, "up", correction="a secret correction") is stored
    assert len(kept(state)) == stored
    ledger().flush()
    found = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert (b"a secret" in found) is stored


def test_what_is_not_rated_is_deleted_after_its_time(net: Loopback, waterfall: Write, state: Path) -> None:
    asking = client(net, waterfall, {"store_rated": "1s"})
    first, _ = asking.complete("one"), asking.complete("two")
    asking.rate(first, "up")
    time.sleep(1.1)
    asking.complete("three")
    assert [each.messages[-1]["content"] for each in kept(state)] == ["one"]
    until(lambda: b"three" in everything(state))
    assert b'"two"' not in everything(state)


def test_it_is_deleted_also_after_keeping_was_turned_off(net: Loopback, waterfall: Write, state: Path) -> None:
    client(net, waterfall, {"store_rated": "1s"}).complete("two")
    ratings().close()
    time.sleep(1.1)
    Ratings(state).close()
    assert b'"two"' not in everything(state)


def everything(state: Path) -> bytes:
    import sqlite3

    with sqlite3.connect(state / FILE) as db:
        return "\n".join(db.iterdump()).encode()


def test_usage_reports_by_rating(net: Loopback, waterfall: Write, biollm: Any) -> None:
    asking = client(net, waterfall, {})
    for rating in ("up", "up", "down", None):
        answer = asking.complete("Why?")
        if rating:
            asking.rate(answer, rating)  # type: ignore[arg-type]
    report = biollm("usage", "--by", "rating", "--json").json
    assert {row["name"]: row["requests"] for row in report["rows"]} == {"up": 2, "down": 1, "(none)": 1}
    assert report["total"]["requests"] == 4


def test_the_command_line_rates_by_id(net: Loopback, waterfall: Write, biollm: Any, tmp_path: Path) -> None:
    client(net, waterfall, KEEP)
    (right := tmp_path / "right.txt").write_text("disk full")
    ident = biollm("complete", "hi", "--json").json["id"]
    ratings().close()  # as at the end of its own process
    ran = biollm("rate", ident[:8], "down", "--correction", right)
    assert (ran.code, ran.out) == (0, f"{ident}: rated down.\n")
    assert biollm("rate", "last", "up").code == 0


def test_without_keeping_it_says_what_is_lost(net: Loopback, waterfall: Write, biollm: Any, tmp_path: Path) -> None:
    client(net, waterfall, {}).complete("hi")
    (right := tmp_path / "right.txt").write_text("disk full")
    ledger().flush()
    out = biollm("rate", "last", "down", "--correction", right).out
    assert "Its prompt was not kept" in out and "The correction is not kept either." in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["last", "up"], "There is no answer yet."),
        (["abcdef12", "up"], "No answer has the id abcdef12."),
        (["abc", "up"], "'abc' is too short for an id."),
        (["last", "sideways"], "The rating is 'sideways'; it must be up or down."),
        (["last", "down", "--correction", "/nothing"], "biollm: /nothing: No such file or directory.\n"),
        (["last", "down", "--correction", "/dev/null"], "A correction is empty: /dev/null."),
        (["last", "up", "--correction", "/etc/hostname"], "A correction goes with `down`."),
    ],
)
def test_what_cannot_be_rated_is_one_sentence(
    net: Loopback, waterfall: Write, biollm: Any, words: list[str], problem: str
) -> None:
    waterfall(first=net.serve(then=HTTP_500))
    ran = biollm("rate", *words)
    assert ran.code == 2
    assert problem in ran.err
    with pytest.raises(UsageError):
        get_model_client(sender="direct").rate("last", "sideways")  # type: ignore[arg-type]


def test_a_file_that_cannot_be_used_is_one_sentence(
    net: Loopback, waterfall: Write, state: Path, biollm: Any, tmp_path: Path
) -> None:
    client(net, waterfall, {}).complete("Why?")
    ledger().flush()
    (state / FILE).mkdir()
    for command in ("rate last up", "usage --by rating", f"tune export -o {tmp_path}/train.jsonl"):
        ran = biollm(*command.split())
        assert (ran.code, f"The ratings in {state} cannot be used: " in ran.err) == (2, True)
