"""What a model gave besides text comes back to that model, and to no other."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from provider import Loopback

from biollm.client import Client
from biollm.ledger import Ledger
from biollm.routing.origins import Origins

Json = dict[str, Any]
THOUGHT = "The file is likely in src."
SIGNED = {"google": {"thought_signature": "c2lnbmF0dXJl"}}
ASKED: list[Json] = [{"role": "user", "content": "hi"}]


def call(**more: Any) -> Json:
    return {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}, **more}


GIVEN: Json = {"role": "assistant", "content": "I look.", "reasoning_content": THOUGHT, "tool_calls": [call(extra_content=SIGNED)]}  # fmt: skip
BARE: Json = {"role": "assistant", "content": "I look.", "tool_calls": [call()]}
RESULT: Json = {"role": "tool", "tool_call_id": "call_1", "content": "main.py"}


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Callable[[], Ledger]]:
    """Open the ledger of one folder as one more process would."""
    opened: list[Ledger] = []

    def make(**more: Any) -> Ledger:
        opened.append(Ledger(tmp_path / "ledger", **more))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def returned(origins: Origins, messages: list[Json], model: str) -> list[Json]:
    return list(asyncio.run(origins.returned(messages, model)))


def test_it_goes_back_to_its_model_alone(shared: Any, tmp_path: Path) -> None:
    origins = Origins(shared(), tmp_path)
    assert returned(origins, [*ASKED, GIVEN, RESULT], "a") == [*ASKED, BARE, RESULT]  # not known yet
    origins.note("a", GIVEN)
    assert returned(origins, [*ASKED, GIVEN, RESULT], "a") == [*ASKED, GIVEN, RESULT]
    assert returned(origins, [*ASKED, GIVEN, RESULT], "b") == [*ASKED, BARE, RESULT]


def test_each_field_is_judged_by_itself(shared: Any, tmp_path: Path) -> None:
    origins = Origins(shared(), tmp_path)
    origins.note("a", {**GIVEN, "tool_calls": None})
    origins.note("b", {"tool_calls": [call(extra_content=SIGNED)]})
    assert returned(origins, [GIVEN], "a") == [{**BARE, "reasoning_content": THOUGHT}]
    assert returned(origins, [GIVEN], "b") == [{**BARE, "tool_calls": GIVEN["tool_calls"]}]
    two = {**GIVEN, "tool_calls": [*GIVEN["tool_calls"], call(id="call_2", extra_content={"x": 1})]}
    kept = returned(origins, [two], "b")[0]["tool_calls"]
    assert [each.get("extra_content") for each in kept] == [SIGNED, None]


def test_clients_may_trim_it_and_order_its_keys(shared: Any, tmp_path: Path) -> None:
    origins = Origins(shared(), tmp_path)
    origins.note("a", {"reasoning_content": f"{THOUGHT}\n", "extra_content": {"x": 1, "y": 2}})
    sent = {**BARE, "reasoning_content": THOUGHT, "extra_content": {"y": 2, "x": 1}}
    assert returned(origins, [sent], "a") == [sent]


def test_other_processes_know_it_for_a_day(shared: Any, tmp_path: Path) -> None:
    now = [1e9]
    first = shared(clock=lambda: now[0])
    Origins(first, tmp_path).note("a", GIVEN)
    first.flush()
    assert returned(Origins(shared(), tmp_path), [GIVEN], "a") == [GIVEN]
    now[0] += 86500
    first.release(1, "any")  # a write, which removes what is old
    first.flush()
    assert returned(Origins(shared(), tmp_path), [GIVEN], "a") == [BARE]


def test_only_a_keyed_digest_is_stored(shared: Any, tmp_path: Path) -> None:
    first = shared()
    Origins(first, tmp_path).note("a", GIVEN)
    first.flush()
    with sqlite3.connect(tmp_path / "ledger" / "quotas.db") as db:
        rows = db.execute("SELECT digest, model FROM origin").fetchall()
    assert sorted({len(digest) for digest, _ in rows}) == [32]
    assert all(THOUGHT.encode() not in file.read_bytes() for file in (tmp_path / "ledger").iterdir())
    key = tmp_path / "origins.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.unlink()  # with another key the same text is another digest
    assert returned(Origins(shared(), tmp_path), [GIVEN], "a") == [BARE]


def test_without_a_file_it_holds_within_the_process(shared: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    origins = Origins(shared(), tmp_path / "file")
    origins.note("a", GIVEN)
    assert returned(origins, [GIVEN], "a") == [GIVEN]


@pytest.mark.parametrize("calls", [7, "x", [], {}, [7], [{"function": None}], None])
def test_odd_tool_calls_are_left_to_the_provider(shared: Any, tmp_path: Path, calls: Any) -> None:
    odd = {"role": "assistant", "content": "I look.", "tool_calls": calls}
    assert returned(Origins(shared(), tmp_path), [odd], "a") == [odd]


def test_a_request_without_such_fields_goes_on_as_it_is(shared: Any, tmp_path: Path) -> None:
    messages = [*ASKED, BARE, RESULT]
    assert asyncio.run(Origins(shared(), tmp_path).returned(messages, "a")) is messages


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sender", ["litellm", "direct"])
def test_a_conversation_moves_to_another_model_and_back(
    net: Loopback, waterfall: Callable[..., Path], sender: Any, stream: bool
) -> None:
    first, third = (net.serve(answer=lambda _: GIVEN) for _ in range(2))
    second = net.serve()
    waterfall(
        first={"base_url": first.url, "models": ["thinker"]},
        second={"base_url": second.url, "models": ["other"]},
        third={"base_url": third.url, "models": ["thinker"]},
    )
    client = Client(sender=sender)

    def ask(provider: str, messages: list[Json]) -> Json:
        if not stream:
            return client.complete(messages, provider=provider).raw["choices"][0]["message"]
        *_, last = client.stream(messages, provider=provider)
        return last.completion.raw["choices"][0]["message"]  # pyright: ignore

    answer = ask("first", ASKED)
    assert (answer["reasoning_content"], answer["tool_calls"][0]["extra_content"]) == (THOUGHT, SIGNED)
    for provider, server, kept in (("first", first, True), ("second", second, False), ("third", third, True)):
        ask(provider, [*ASKED, answer, RESULT])
        message = server.completions[-1].body["messages"][1]
        assert ("reasoning_content" in message, "extra_content" in message["tool_calls"][0]) == (kept, kept), provider
        assert message["content"] == "I look."
