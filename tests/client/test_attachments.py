"""Files and texts beside a question: each deployment gets what fits it, and the question is never cut."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import HTTP_500, Behaviour
from provider import Loopback, Server

from biollm._runtime import ledger
from biollm.client import Completion, PromptTooLongError, UsageError, get_model_client

Write = Callable[..., Path]
CAUSE = "Process `STAR (sample_1)` terminated with an error exit status (137)"
QUESTION = "Why did this fail? " + "Answer in one sentence. " * 20
TOO_LONG = Behaviour(
    status=400, body=json.dumps({"error": {"message": "too many tokens", "code": "context_length_exceeded"}})
)


def log(lines: int) -> str:
    """A log whose cause is in its middle."""
    words = [
        "queue",
        "task",
        "cache",
        "stage",
        "align",
        "sort",
        "index",
        "merge",
        "report",
        "stats",
        "input",
        "output",
        "channel",
        "value",
    ]
    picked = random.Random(1)
    half = [f"[{n:06}] {' '.join(picked.choices(words, k=9))}\n" for n in range(lines // 2)]
    return "".join([*half, f"ERROR ~ {CAUSE}\n", *half])


def models(**contexts: int) -> dict[str, Any]:
    return {"models": {name: {"type": "api", "context_length": size} for name, size in contexts.items()}}


def sent(server: Server) -> str:
    return server.completions[-1].body["messages"][-1]["content"]


@pytest.fixture
def sized(net: Loopback, waterfall: Write) -> Callable[..., list[Server]]:
    """Write a waterfall with a deployment of each context; all but the last fail."""

    def write(*contexts: int, **more: Any) -> list[Server]:
        servers = [net.serve(then=HTTP_500) for _ in contexts[:-1]] + [net.serve()]
        rungs = {f"p{at}": {"base_url": server.url, "models": [f"m{at}"], **more} for at, server in enumerate(servers)}
        waterfall(models(**{f"m{at}": size for at, size in enumerate(contexts)}), **rungs)
        return servers

    return write


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_deployment_gets_its_own_cut(
    sized: Callable[..., list[Server]], tmp_path: Path, asynchronous: bool
) -> None:
    small, large = sized(8_192, 131_072)
    (file := tmp_path / "nextflow.log").write_text(log(20_000))
    client, notes = get_model_client(), list[str]()
    options: Any = {"attachments": [file], "on_note": notes.append}
    answer = (
        asyncio.run(client.acomplete(QUESTION, **options)) if asynchronous else client.complete(QUESTION, **options)
    )
    for server, context in ((small, 8_192), (large, 131_072)):
        assert sent(server).startswith("--- nextflow.log ---\n[000000]")
        assert sent(server).endswith(QUESTION)
        assert CAUSE in sent(server)
        assert "lines left out ...]" in sent(server)
        assert len(sent(server)) < 3 * context
    assert len(sent(large)) > 5 * len(sent(small))
    assert [note.partition(" lines condensed to ")[0] for note in notes] == ["nextflow.log: 20,001"] * 2
    assert " of 8.19k tokens)" in notes[0]
    assert answer.notes == (notes[1],)


def test_what_fits_is_sent_as_it_is(sized: Callable[..., list[Server]], tmp_path: Path) -> None:
    [server] = sized(32_768)
    (file := tmp_path / "a.log").write_text("one\ntwo\n")
    answer = get_model_client().complete("Why?", attachments=[file, "three", {"name": "b.log", "text": "four"}])
    assert sent(server) == "--- a.log ---\none\ntwo\n\n\n--- text ---\nthree\n\n--- b.log ---\nfour\n\nWhy?"
    assert answer.notes == ()


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "?"}],
            ["--- text ---\nx\n\nWhy?", "?"],
        ),
        ([{"role": "system", "content": "s"}], ["s", "--- text ---\nx"]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
            [[{"type": "text", "text": "--- text ---\nx"}, {"type": "text", "text": "Why?"}]],
        ),
    ],
)
def test_an_attachment_goes_before_the_last_question(
    sized: Callable[..., list[Server]], messages: list[Any], expected: list[Any]
) -> None:
    [server] = sized(32_768)
    get_model_client().complete(messages, attachments=["x"])
    assert [message["content"] for message in server.completions[0].body["messages"]] == expected


def test_a_limit_of_tokens_bounds_the_cut(sized: Callable[..., list[Server]]) -> None:
    [server] = sized(131_072, token_limit="6k/min")
    answer = get_model_client().complete(QUESTION, attachments=[log(4_000)], max_tokens=500)
    assert CAUSE in sent(server)
    assert len(sent(server)) < 3 * 6_000
    assert answer.deployment == "p0/m0"


def test_short_attachments_leave_their_room_to_long_ones(sized: Callable[..., list[Server]]) -> None:
    [server] = sized(16_384)
    get_model_client().complete("Why?", attachments=[log(4_000), "the whole of a short text", log(4_000)])
    assert "the whole of a short text" in sent(server)
    assert sent(server).count(CAUSE) == 2


def test_a_deployment_that_counts_more_tokens_is_sent_a_shorter_cut(net: Loopback, waterfall: Write) -> None:
    server = net.serve(TOO_LONG)
    waterfall(models(small=8_192), first=server)
    get_model_client().complete("Why?", attachments=[log(2_000)])
    first, second = (request.body["messages"][0]["content"] for request in server.completions)
    assert len(second) < 0.7 * len(first)
    assert CAUSE in second


def test_a_stream_has_its_cut_too(sized: Callable[..., list[Server]]) -> None:
    small, large = sized(8_192, 131_072)

    async def pieces() -> list[Any]:
        return [piece async for piece in get_model_client().astream("Why?", attachments=[log(20_000)])]

    for found in (list(get_model_client().stream("Why?", attachments=[log(20_000)])), asyncio.run(pieces())):
        assert found[-1].completion.deployment == "p1/m1"
    assert CAUSE in sent(small)
    assert len(sent(large)) > 5 * len(sent(small))


def test_many_questions_about_one_log(sized: Callable[..., list[Server]], tmp_path: Path) -> None:
    [server] = sized(8_192)
    (file := tmp_path / "a.log").write_text(log(4_000))
    answers = get_model_client().complete_many(["What?", "Why?"], attachments=[file])
    assert all(isinstance(answer, Completion) for answer in answers)
    assert all(CAUSE in request.body["messages"][0]["content"] for request in server.completions)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([7], "attachments[0] is a int; it must be a Path, a text, or"),
        ([{"name": "a"}], "attachments[0] is a dict; it must be a Path, a text, or"),
        ("a.log", "attachments is 'a.log'; it must be a list of paths"),
        (["a.log"], "attachments[0] is the text 'a.log', which is also a file."),
        ([Path("b.log")], "b.log: No such file or directory."),
    ],
)
def test_what_is_no_attachment_is_refused(
    sized: Callable[..., list[Server]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.log").write_text("a file")
    [server] = sized(8_192)
    with pytest.raises(UsageError) as raised:
        get_model_client().complete("Why?", attachments=given)
    assert str(raised.value).startswith(problem)
    assert not server.requests


def test_a_prompt_that_fits_nowhere_is_one_headline(net: Loopback, waterfall: Write) -> None:
    server = net.serve()
    keyless = {"base_url": server.url, "models": ["big"], "env_key": "NOT_SET"}
    waterfall(models(small=8_192, big=1_000_000), first=server, second=keyless)
    for options in ({"prompt": log(4_000)}, {"prompt": "Why?", "attachments": [log(4_000)], "condense": False}):
        with pytest.raises(PromptTooLongError) as raised:
            get_model_client().complete(**options)  # pyright: ignore # a table of calls
        headline, *reasons = str(raised.value).splitlines()
        assert headline.startswith("The prompt is too long: about ")
        assert headline.endswith("k tokens; the longest context that could answer is 8.19k.")
        assert "second/big: no key: set NOT_SET" in reasons[1]
        assert raised.value.exit_code == 65
    assert not server.requests


def test_how_a_model_counts_is_learned_from_what_it_states(net: Loopback, waterfall: Write, state: Path) -> None:
    server = net.serve()
    waterfall(models(small=32_768), first=server)
    text = "word " * 2_000
    client = get_model_client()
    [before] = client.explain(text)
    assert before.status == "ready"
    for _ in range(3):
        client.complete(text)  # the server states a token for each word
    ledger().flush()
    assert ledger().token_ratio("small") == pytest.approx(2_000 / 2_300)
    ledger().close()


@pytest.mark.slow
def test_attachments_go_through_the_gateway(
    sized: Callable[..., list[Server]], gateway: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    small, large = sized(8_192, 131_072)
    gateway()
    (file := tmp_path / "nextflow.log").write_text(log(100_000))
    answer = get_model_client().complete(QUESTION, attachments=[file])
    assert answer.deployment == "p1/m1"
    assert [CAUSE in sent(server) for server in (small, large)] == [True, True]
    assert len(sent(large)) > 5 * len(sent(small))
    assert answer.notes[0].startswith("nextflow.log: 100,001 lines condensed to ")


@pytest.mark.parametrize("words", range(1, 40, 3))
def test_no_rounding_cuts_a_short_text(net: Loopback, waterfall: Write, words: int) -> None:
    server = net.serve()
    waterfall(models(small=32_768), first=server)
    client = get_model_client()
    ledger().learn_tokens("small", 1000, 700)
    text = "".join(f"line {n} of the file\n" for n in range(words))
    answer = client.complete("Why?", attachments=[text])
    assert (answer.notes, text in sent(server)) == ((), True)
    ledger().close()
