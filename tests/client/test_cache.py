"""The cache of answers: one request, one answer; nothing that could differ is shared, and no fault of it reaches the caller."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from behaviours import HTTP_400, OK, Behaviour
from conftest import until
from provider import Loopback, Server
from pydantic import BaseModel

from biollm import evals
from biollm._runtime import ledger
from biollm.client import Client, CompletionError, DeadlineError, UsageError, cache_key, get_model_client, normalize_log
from biollm.client import cache as caching
from biollm.client.cache import LEASE, may_keep
from biollm.types import Completion, Fields

Write = Callable[..., Path]
SLOW = Behaviour(hang=1, pause=0.7)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"path": {"type": "string"}}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Answer(BaseModel):
    a: int


@pytest.fixture
def client(net: Loopback, waterfall: Write, server: Server) -> Client:
    waterfall(first=server)
    return get_model_client(sender="direct")


@pytest.fixture
def server(net: Loopback) -> Server:
    """A server that numbers its answers."""
    made = net.serve()
    made.answer = lambda body: {"role": "assistant", "content": f"answer {len(made.completions)}"}
    return made


def rows(state: Path, sql: str = "SELECT key, at, body FROM answer ORDER BY at") -> list[Any]:
    with sqlite3.connect(state / "cache.db") as db:
        return db.execute(sql).fetchall()


# --- hits ----------------------------------------------------------------------------------------------------------


def test_a_request_that_comes_again_is_not_sent(client: Client, server: Server) -> None:
    first, second = (client.complete("why?", cache=True) for _ in range(2))
    assert (first.cached, second.cached, len(server.completions)) == (False, True, 1)
    same = ("text", "provider", "account", "model", "deployment", "usage", "finish_reason", "raw", "degraded", "notes")
    assert {name: getattr(first, name) for name in same} == {name: getattr(second, name) for name in same}
    assert (second.cost_usd, second.attempts, isinstance(second.raw, Fields)) == (0, (), True)
    assert second.raw.choices[0].message.content == str(second) == "answer 1"


@pytest.mark.parametrize("options", [{}, {"cache": False}, {"cache": False, "cache_key": normalize_log}])
def test_nothing_is_stored_unless_a_call_asks_for_it(options: Any, client: Client, server: Server, state: Path) -> None:
    assert [str(client.complete("why?", **options)) for _ in range(2)] == ["answer 1", "answer 2"]
    assert not (state / "cache.db").exists()


def test_it_can_be_a_default_of_the_client(waterfall: Write, server: Server) -> None:
    waterfall(first=server)
    client = get_model_client(sender="direct", cache=True)
    assert [str(client.complete("why?")) for _ in range(2)] == ["answer 1"] * 2
    assert str(client.complete("why?", cache=False)) == "answer 2"


def test_every_way_of_asking_takes_and_keeps(client: Client, server: Server) -> None:
    async def astream(prompt: str) -> str:
        return "".join([str(piece) async for piece in client.astream(prompt, cache=True)])

    async def amany(prompt: str) -> str:
        return str((await client.acomplete_many([prompt], cache=True))[0])

    ways: dict[str, Callable[[str], str]] = {
        "complete": lambda prompt: str(client.complete(prompt, cache=True)),
        "acomplete": lambda prompt: str(asyncio.run(client.acomplete(prompt, cache=True))),
        "stream": lambda prompt: "".join(map(str, client.stream(prompt, cache=True))),
        "astream": lambda prompt: asyncio.run(astream(prompt)),
        "complete_many": lambda prompt: str(client.complete_many([prompt], cache=True)[0]),
        "acomplete_many": lambda prompt: asyncio.run(amany(prompt)),
    }
    for number, (name, way) in enumerate(ways.items(), 1):
        assert way(name) == f"answer {number}", name
        assert {again(name) for again in ways.values()} == {f"answer {number}"}, name


def test_a_stored_answer_is_streamed_whole(net: Loopback, waterfall: Write) -> None:
    thought = {"role": "assistant", "reasoning_content": "Let me see.", "content": "It ran out of memory."}
    waterfall(first=net.serve(answer=lambda _: thought))
    client = get_model_client(sender="direct")
    list(client.stream("why?", cache=True))
    pieces = list(client.stream("why?", cache=True))
    assert [(piece.kind, str(piece)) for piece in pieces] == [
        ("reasoning", ""), ("text", "It ran out of memory."), ("usage", "")
    ]  # fmt: skip
    assert pieces[0].chunk["choices"][0]["delta"] == {"reasoning_content": "Let me see."}
    assert (pieces[-1].completion.cached, pieces[-1].completion.reasoning) == (True, "Let me see.")


def test_a_stream_that_is_left_keeps_nothing(client: Client, server: Server) -> None:
    server.behaviour = Behaviour(every=0.05)
    server.answer = lambda _: {"role": "assistant", "content": "one two three four five six seven eight"}
    pieces = client.stream("why?", cache=True)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not client.complete("why?", cache=True).cached


def test_prompts_of_one_list_that_are_equal_are_sent_once(client: Client, server: Server) -> None:
    server.behaviour = SLOW
    answers = client.complete_many(["a", "b"] * 4, cache=True)
    assert (len(server.completions), sum(answer.cached for answer in answers)) == (2, 6)  # type: ignore[union-attr]


@pytest.mark.parametrize("wanted", [SCHEMA, Answer])
def test_a_typed_answer_is_parsed_again(wanted: Any, net: Loopback, waterfall: Write) -> None:
    server = net.serve(answer=lambda _: {"role": "assistant", "content": '```json\n{"a": 3}\n```'})
    waterfall(first=server)
    client = get_model_client(sender="direct")
    first, second = (client.complete("why?", response_model=wanted, cache=True) for _ in range(2))
    assert (first.parsed, second.cached, len(server.completions)) == (second.parsed, True, 1)
    assert isinstance(second.parsed, dict if wanted is SCHEMA else Answer)


def test_ensembles_and_comparisons_bypass_it(waterfall: Write, server: Server, state: Path, tmp_path: Path) -> None:
    waterfall(first=server)
    client = get_model_client(sender="direct", cache=True)
    server.answer = lambda body: {
        "role": "assistant",
        "content": '{"winner": 1, "answer": 1, "reason": "x"}'
        if "Answer 1" in str(body)
        else f"answer {len(server.completions)}",
    }
    client.ensemble("why?", members=["small", "small"], method="judge")
    (inputs := tmp_path / "inputs.jsonl").write_text('{"prompt": "why?"}\n')
    evals.compare([inputs], ["small", "first/small"], client=client)
    assert len(server.completions) == 3 + 2
    assert not (state / "cache.db").exists()


# --- the key -------------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"prompt": "why?"}
DIFFERENT: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "why not?"},
    "system": {"system": "Be brief."},
    "messages": {"prompt": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "?"}]},
    "temperature": {"temperature": 0.0},
    "another temperature": {"temperature": 0.5},
    "max_tokens": {"max_tokens": 100},
    "tools": {"tools": [TOOL]},
    "tool_choice": {"tools": [TOOL], "tool_choice": "none"},
    "seed": {"extra": {"seed": 1}},
    "stop": {"extra": {"stop": ["x"]}},
    "top_p": {"extra": {"top_p": 0.9}},
    "extra_body": {"extra": {"extra_body": {"min_tokens": 3}}},
    "schema": {"response_model": SCHEMA},
    "class": {"response_model": Answer},
    "provider": {"provider": "first"},
    "model": {"model": "small"},
    "no_training": {"data_policy": "no_training"},
    "local_only": {"local_only": True},
    "attachment": {"attachments": [{"name": "a.log", "text": "failed"}]},
    "its name": {"attachments": [{"name": "b.log", "text": "failed"}]},
    "its text": {"attachments": [{"name": "a.log", "text": "failed twice"}]},
    "fallback": {"fallback": False},
    "redact": {"redact": True},
    "redact_names": {"redact_names": ["ann"]},
    "similar": {"cache_key": normalize_log},
    "the key of a gateway": {"tags": {"key": "bob"}},
}  # fmt: skip
SAME: dict[str, dict[str, Any]] = {
    "tags": {"tags": {"agent": "x"}},
    "limits of time": {"timeout": 9, "deadline": 60, "patience": 1, "max_retries": 2},
    "an age": {"cache": "1h"},
    "callbacks": {"on_send": lambda _: None, "on_note": lambda _: None},
    "what only a stream does": {"on_interrupt": "restart"},
    "no degraded answer is kept": {"allow_degraded": True},
}


def key(client: Client, options: dict[str, Any]) -> str:
    given = {"cache": True, **BASE, **options}
    request = client._request(given.pop("prompt"), given)  # type: ignore[arg-type]
    return cache_key.key_of(request, client._load().identity(), request.cache_key)


def test_requests_that_could_have_other_answers_have_other_keys(client: Client) -> None:
    keys = {name: key(client, options) for name, options in {"base": {}, **DIFFERENT}.items()}
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("at", [time.time() + 9, 0], ids=["later", "put back by a copy"])
@pytest.mark.parametrize("changed", ["adapter/adapter_model.safetensors", "base/config.json"])
def test_weights_that_were_trained_again_share_no_answer(
    changed: str, at: float, waterfall: Write, server: Server, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("adapter/adapter_model.safetensors", "base/config.json")]
    for file in files:
        file.parent.mkdir()
        file.touch()
        (file.parent / "a deleted blob").symlink_to("nothing")
    models = {"mine": {"path": str(files[1].parent)}, "tuned": {"base": "mine", "lora": str(files[0].parent)}}
    folder = waterfall(first=server)
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    client = get_model_client(sender="direct")
    first = client.complete("why?", cache=True)
    assert client.complete("why?", cache=True).cached
    os.utime(tmp_path / changed, (0, at))
    assert str(client.complete("why?", cache=True)) != str(first)


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_answer_changes_no_key(name: str, client: Client) -> None:
    assert key(client, SAME[name]) == key(client, {})


def test_a_log_of_which_only_a_part_is_kept_counts_whole(client: Client) -> None:
    lines = [f"line {number} of a long log that no context holds" for number in range(200_000)]
    texts = {}
    for at in (0, 100_000, 199_999):
        text = "\n".join([*lines[:at], "Error: out of memory", *lines[at + 1 :]])
        texts[key(client, {"attachments": [{"name": "x", "text": text}]})] = at
    assert len(texts) == 3


@pytest.mark.parametrize(
    "change",
    [{"base_url": "http://127.0.0.1:1/v1"}, {"models": ["other"]}, {"model_ids": {"small": "x-1"}}, {"priority": 9}],
)
def test_another_configuration_has_another_key(change: dict[str, Any], waterfall: Write) -> None:
    first, second = ({"base_url": f"http://127.0.0.1:{port}/v1"} for port in (9, 8))
    waterfall(first=first, second=second)
    before = key(get_model_client(), {})
    waterfall(first={**first, **change}, second=second)
    assert key(get_model_client(), {}) != before


def test_limits_and_keys_of_the_configuration_are_not_in_the_key(waterfall: Write) -> None:
    first = {"base_url": "http://127.0.0.1:9/v1", "models": ["small"]}
    waterfall({"models": {"small": {"type": "api", "capabilities": list("abcdefgh")}}}, first=first)
    before = key(get_model_client(), {})
    limits = {"rate_limit": "5/min", "env_key": "OTHER_KEY", "timeout": 5}
    waterfall(
        {"models": {"small": {"type": "api", "capabilities": list("hgfedcba")}}, "cache": {"ttl": "1d"}},
        first={**first, **limits},
    )
    assert key(get_model_client(), {}) == before


def test_an_answer_never_crosses_to_a_stricter_policy(
    net: Loopback, waterfall: Write, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall(first=server)
    client = get_model_client(sender="direct")
    client.complete("why?", cache=True)
    for options in ({"data_policy": "no_training"}, {"local_only": True}):
        assert not client.complete("why?", cache=True, **options).cached  # type: ignore[arg-type]
    monkeypatch.setenv("BIOLLM_LOCAL_ONLY", "1")
    assert str(get_model_client(sender="direct").complete("why?", cache=True)) == "answer 3"
    monkeypatch.delenv("BIOLLM_LOCAL_ONLY")
    waterfall({"data_policy": "no_training"}, first=server)
    assert str(get_model_client(sender="direct").complete("why?", cache=True)) == "answer 2"


# --- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Behaviour(finish="length"), None),
        (Behaviour(finish="content_filter"), None),
        (
            OK,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
            },
        ),
    ],
)
def test_an_answer_that_is_not_whole_is_not_kept(how: Behaviour, message: Any, net: Loopback, waterfall: Write) -> None:
    server = net.serve(then=how, answer=message and (lambda _: message))
    waterfall(first=server)
    client = get_model_client(sender="direct")
    for _ in range(2):
        assert not client.complete("why?", cache=True, tools=[TOOL]).cached
    assert len(server.completions) == 2


def completion(text: str = "x", *choices: Any, **more: Any) -> Completion:
    found = choices or ({"message": {"content": text}, "finish_reason": "stop"},)
    return Completion(more.pop("noted", text), "p", "a", "m", "d", raw=Fields({"choices": list(found)}), **more)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (completion(), True),
        (completion(degraded=True), False),
        (completion(noted="before\n\n[The stream of a broke. Another answer follows.]\n\nx"), False),
        (completion("x", {"message": {"content": "x"}, "finish_reason": None}), False),
        (
            completion(
                "x",
                {"message": {"content": "x"}, "finish_reason": "stop"},
                {"message": {"content": ""}, "finish_reason": "length"},
            ),
            False,
        ),
    ],
)
def test_what_is_whole(answer: Completion, kept: bool) -> None:
    assert may_keep(answer) is kept


def test_an_answer_that_the_response_model_refuses_is_asked_for_again(
    client: Client, server: Server, state: Path
) -> None:
    server.answer = lambda _: {"role": "assistant", "content": '{"a": 3}'}
    client.complete("why?", response_model=SCHEMA, cache=True)
    with sqlite3.connect(state / "cache.db") as db:
        db.execute("UPDATE answer SET body = replace(body, ?, ?)", ('"a\\": 3', '"a\\": null'))
    again = client.complete("why?", response_model=SCHEMA, cache=True)
    assert (again.cached, again.parsed, len(server.completions)) == (False, {"a": 3}, 2)
    assert client.complete("why?", response_model=SCHEMA, cache=True).cached


def test_notes_on_the_attachments_come_with_the_answer(client: Client) -> None:
    log = "\n".join(f"line {number}: {'x' * 60}" for number in range(200_000))
    first, second = (
        client.complete("why?", attachments=[{"name": "a.log", "text": log}], cache=True) for _ in range(2)
    )
    assert first.notes == second.notes
    assert "condensed" in first.notes[0]
    noted: list[str] = []
    client.complete("why?", attachments=[{"name": "a.log", "text": log}], cache=True, on_note=noted.append)
    assert tuple(noted) == first.notes


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttl", "cache", "age", "cached"),
    [
        ("7d", True, 6.9, True), ("7d", True, 7.1, False), ("1d", True, 1.1, False),
        ("7d", "2d", 1.9, True), ("7d", "2d", 2.1, False), ("7d", "30d", 7.1, False),
    ],
)  # fmt: skip
def test_an_answer_is_used_for_so_long(
    ttl: str, cache: Any, age: float, cached: bool, waterfall: Write, server: Server, state: Path
) -> None:
    waterfall({"cache": {"ttl": ttl}}, first=server)
    client = get_model_client(sender="direct")
    client.complete("why?", cache=True)
    with sqlite3.connect(state / "cache.db") as db:
        db.execute("UPDATE answer SET at = at - ?", (age * 86400,))
    assert client.complete("why?", cache=cache).cached is cached
    client.complete("another", cache=True)
    assert len(rows(state)) == 2 or age > 7


def test_the_file_stays_within_its_size_and_the_oldest_leave(net: Loopback, waterfall: Write, state: Path) -> None:
    server = net.serve(text="word " * 20_000)
    waterfall({"cache": {"max_mb": 1}}, first=server)
    client = get_model_client(sender="direct")
    for number in range(15):
        client.complete(f"question {number}", cache=True)
    with sqlite3.connect(state / "cache.db") as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert 0.5e6 < (state / "cache.db").stat().st_size <= 1e6
    kept = [json.loads(body)["about"] for _, _, body in rows(state)]
    assert kept == [f"question {number}" for number in range(15 - len(kept), 15)]
    waterfall({"cache": {"max_mb": 0.05}}, first=server)  # an answer that is larger than all room is not kept
    get_model_client(sender="direct").complete("more", cache=True)
    assert rows(state) == []


@pytest.mark.parametrize("given", ["7", "soon", "", "-1d", 7, None, 1.5])
def test_a_wrong_age_is_refused(given: Any, client: Client) -> None:
    with pytest.raises(UsageError, match="it must be True, False, or a time such as 7d"):
        client.complete("why?", cache=given)


def test_a_key_must_be_a_function_that_returns_a_text(client: Client) -> None:
    with pytest.raises(UsageError, match="cache_key is 'similar'; it must be a function"):
        client.complete("why?", cache_key="similar")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cache_key"):
        client.complete("why?", cache_key=lambda _: None)  # type: ignore[arg-type, return-value]


# --- similar requests ----------------------------------------------------------------------------------------------


def test_the_same_failure_of_another_sample_gets_the_answer_and_what_it_was_made_for(
    client: Client, server: Server
) -> None:
    def ask(sample: str, job: int) -> Completion:
        key = partial(normalize_log, names=[sample])
        log = f"slurmstepd: error: JOB {job} ON node{job} CANCELLED\n{sample}.bam: exit status 137\n"
        return client.complete("why?", attachments=[{"name": f"{sample}.log", "text": log}], cache_key=key)

    began = time.time()
    first, again, other = ask("tumor_7", 4711), ask("tumor_7", 4711), ask("liver_2", 99)
    assert (first.cached, first.notes, again.cached, again.notes) == (False, (), True, ())
    assert (other.cached, str(other), len(server.completions)) == (True, "answer 1", 1)
    (note,) = other.notes
    days = [time.strftime("%Y-%m-%d", time.gmtime(at)) for at in (began, time.time())]
    assert note.startswith(tuple(f"This answer was made at {day} " for day in days))
    assert note.endswith("for a similar request: why?; tumor_7.log: slurmstepd: error: JOB 4711 ON node4711 CANCELLED")


def test_a_request_as_it_is_gets_no_answer_of_a_similar_one(client: Client) -> None:
    client.complete("exit 137", cache_key=normalize_log)
    assert not client.complete("exit 137", cache=True).cached
    assert not client.complete("exit 139", cache_key=normalize_log).cached


# --- one flight ----------------------------------------------------------------------------------------------------


FIFTY = """
import os
from biollm.client import get_model_client
client = get_model_client(sender="direct")
client.config
children = []
for _ in range(50):  # before this process has a thread
    if (child := os.fork()) == 0:
        os.write(1, f"{client.complete('why?', cache=True)}\\n".encode())
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_of_50_processes_one_sends(waterfall: Write, server: Server) -> None:
    server.behaviour = Behaviour(hang=1, pause=2)
    waterfall(first=server)
    ran = subprocess.run([sys.executable, "-c", FIFTY], capture_output=True, text=True, timeout=250, check=True)
    assert ran.stdout.splitlines() == ["answer 1"] * 50
    assert (len(server.completions), ran.stderr) == (1, "")


def ask_at_once(client: Client, count: int, **options: Any) -> list[Any]:
    def one(_: int) -> Any:
        try:
            return client.complete("why?", cache=True, **options)
        except CompletionError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.slow
def test_a_leader_that_dies_is_replaced(client: Client, server: Server) -> None:
    server.script = [Behaviour(hang=0)]
    if (leader := os.fork()) == 0:
        client.complete("why?", cache=True)
        os._exit(0)
    until(lambda: server.completions)
    waiter = threading.Thread(target=ask_at_once, args=(client, 3))
    waiter.start()
    time.sleep(1.5 * LEASE)  # it renews its lease
    assert len(server.completions) == 1
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    took = until(lambda: not waiter.is_alive(), 60)
    assert (len(server.completions), took < 2 * LEASE) == (2, True)


def test_a_leader_that_fails_is_followed_by_the_next(client: Client, server: Server) -> None:
    server.script = [Behaviour(status=400, body=HTTP_400.body, hang=1, pause=0.3)]
    server.behaviour = SLOW
    answers = ask_at_once(client, 5)
    assert sum(isinstance(each, CompletionError) for each in answers) == 1
    assert (len(server.completions), sum(getattr(each, "cached", False) for each in answers)) == (2, 3)


def test_after_three_failures_each_sends_its_own(client: Client, server: Server) -> None:
    server.behaviour = Behaviour(status=400, body=HTTP_400.body, hang=1, pause=0.2)
    answers = ask_at_once(client, 6)
    assert all(isinstance(each, CompletionError) for each in answers)
    assert len(server.completions) == 6
    server.behaviour = OK
    assert not client.complete("why?", cache=True).cached


def test_no_request_waits_for_an_answer_that_is_not_kept(client: Client, server: Server) -> None:
    server.behaviour = Behaviour(finish="length", hang=1, pause=1.5)
    began = time.monotonic()
    answers = ask_at_once(client, 6)
    assert (len(server.completions), {answer.finish_reason for answer in answers}) == (6, {"length"})
    assert time.monotonic() - began < 6  # one after the other, it would take 9 s


def test_a_waiter_keeps_its_own_deadline_and_notes_its_wait(client: Client, server: Server) -> None:
    server.behaviour = Behaviour(hang=1, pause=3)
    leader = threading.Thread(target=ask_at_once, args=(client, 1))
    leader.start()
    until(lambda: server.completions)
    noted: list[str] = []
    with pytest.raises(DeadlineError, match=r"within the deadline of 0\.5 s"):
        client.complete("why?", cache=True, deadline=0.5, on_note=noted.append)
    assert noted == ["waiting for the answer to the same request, which is under way"]
    assert str(client.complete("why?")) == "answer 2"  # without the cache nothing waits
    leader.join()


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Keep other writers of a file waiting."""
    with lock.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def test_a_caller_that_leaves_while_it_joins_leads_nobody(client: Client, server: Server, state: Path) -> None:
    client.complete("another", cache=True)  # makes the file

    async def leave() -> None:
        asking = asyncio.ensure_future(client.acomplete("why?", cache=True))
        with held(state / "cache.lock"):
            await asyncio.sleep(0.3)  # it waits for the file, in a thread that cannot be cancelled
            asking.cancel()
            await asyncio.sleep(0.1)
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: not any(thread.name == "biollm-apart" for thread in threading.enumerate()))
    began = time.monotonic()
    assert str(client.complete("why?", cache=True)) == "answer 2"
    assert time.monotonic() < began + LEASE / 2


def test_a_leader_that_is_cancelled_leaves_at_once(client: Client, server: Server) -> None:
    server.script = [Behaviour(hang=0)]

    async def both() -> Completion:
        leader = asyncio.ensure_future(client.acomplete("why?", cache=True))
        while not server.completions:
            await asyncio.sleep(0.01)
        waiter = asyncio.ensure_future(client.acomplete("why?", cache=True))
        await asyncio.sleep(0.2)
        leader.cancel()
        return await waiter

    began = time.monotonic()
    assert str(asyncio.run(both())) == "answer 2"
    assert time.monotonic() - began < LEASE / 2


# --- the file ------------------------------------------------------------------------------------------------------


def test_it_is_private_and_holds_json(client: Client, state: Path) -> None:
    client.complete("why?", cache=True)
    for file in state.glob("cache*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    ((_, _, body),) = rows(state)
    assert json.loads(body)["answer"]["text"] == "answer 1"
    assert "sk-planted" not in body


def test_in_a_folder_of_a_group_it_is_the_users_own(
    client: Client, server: Server, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.mkdir(exist_ok=True)
    state.chmod(0o2770)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    client.complete("why?", cache=True)
    assert not (state / "cache.db").exists()
    assert stat.S_IMODE((tmp_path / "home" / "biollm" / "cache.db").stat().st_mode) == 0o600


def test_on_a_network_file_system_it_has_a_rollback_journal(tmp_path: Path) -> None:
    for network, mode in ((True, "persist"), (False, "wal")):
        folder = tmp_path / mode
        folder.mkdir()
        made = caching.Cache(folder, network=network)
        found = made._transact(lambda db, _: db.execute("PRAGMA journal_mode").fetchone()[0])
        assert found == mode


def broken(state: Path, how: str) -> Iterator[None]:
    state.mkdir(parents=True, exist_ok=True)
    if how == "garbage":
        (state / "cache.db").write_bytes(b"no database at all" * 1000)
        yield
    elif how == "folder":
        (state / "cache.db").mkdir()
        yield
    elif how == "read-only":
        (state / "cache.db").touch()
        with sqlite3.connect(f"file:{state / 'cache.db'}?immutable=1", uri=True):
            (state / "cache.lock").mkdir()
            yield
    else:
        with sqlite3.connect(state / "cache.db") as db:
            db.execute("CREATE TABLE x (y)")
            db.execute("BEGIN EXCLUSIVE")
            yield


@pytest.mark.parametrize("how", ["garbage", "folder", "read-only", "locked"])
def test_a_file_that_cannot_be_used_fails_no_completion(
    how: str, client: Client, server: Server, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault = broken(state, how)
    next(fault)
    began = time.monotonic()
    answers = [client.complete("why?", cache=True) for _ in range(3)]
    assert str(answers[0]) == "answer 1"
    assert time.monotonic() - began < 5
    assert len(server.completions) == (1 if how == "garbage" else 3)
    warnings = [record.getMessage() for record in caplog.records if "cache" in record.getMessage()]
    assert len(warnings) == 1
    assert ("is damaged" if how == "garbage" else "requests are sent as without it") in warnings[0]


def test_a_hit_is_recorded_as_what_it_saved(client: Client, state: Path) -> None:
    client.complete("why?", cache=True, tags={"agent": "a"})
    client.complete("why?", cache=True, tags={"agent": "b"})
    ledger().flush()
    sent, hit = ledger().history()
    assert (sent.outcome, hit.outcome, hit.deployment, hit.tags) == ("ok", "cached", "first/small", {"agent": "b"})
    assert (hit.prompt_tokens, hit.completion_tokens) == (sent.prompt_tokens, sent.completion_tokens)
