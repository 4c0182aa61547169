"""Towards a provider that trains on prompts, what is private leaves as placeholders; the answer has it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from provider import Json, Loopback, Server
from pydantic import BaseModel

from biollm.client import StreamChunk, get_model_client

Write = Callable[..., Path]
LOG = "ERROR: /home/annika/run/a.bam: Permission denied\nTOKEN=abc123def456ghi789\nfrom: annika@lab.example.org\n"
SECRETS = ("annika", "abc123def456ghi789", "lab.example.org")


class Found(BaseModel):
    owner: str


@pytest.fixture
def asked(net: Loopback, waterfall: Write) -> Callable[..., Server]:
    """A waterfall of one provider that repeats the line with the error."""

    def write(trains: bool, **more: Any) -> Server:
        def answer(body: Json) -> Json:
            prompt = next(each["content"] for each in reversed(body["messages"]) if "ERROR" in str(each["content"]))
            text = next(line for line in prompt.splitlines() if "ERROR" in line)
            owner = json.dumps({"owner": text.split()[1].split("/run")[0]})
            return {"role": "assistant", "content": owner if "response_format" in body else text}

        server = net.serve(answer=answer)
        waterfall(first={"base_url": server.url, "trains_on_prompts": trains, "free_tier": True, **more})
        return server

    return write


def sent(server: Server) -> str:
    return json.dumps([request.body for request in server.requests])


@pytest.mark.parametrize(
    ("trains", "options", "redacted"),
    [
        (True, {}, True),
        (True, {"redact": False}, False),
        (False, {}, False),
        (False, {"redact": True}, True),
        (False, {"redact_names": ["a.bam"]}, True),
        (True, {"tools": [{"type": "function", "function": {"name": "ls"}}]}, False),
    ],
)
def test_what_is_private_leaves_where_it_may(
    asked: Callable[..., Server], trains: bool, options: dict[str, Any], redacted: bool
) -> None:
    server, notes = asked(trains), list[str]()
    answer = get_model_client().complete("Why?", attachments=[LOG], on_note=notes.append, **options)
    assert [secret in sent(server) for secret in SECRETS] == [not redacted] * 3
    assert str(answer) == "ERROR: /home/annika/run/a.bam: Permission denied"
    assert answer.raw.choices[0].message.content == str(answer)
    assert bool(notes) == redacted
    if redacted:
        assert notes[0].startswith("redacted: ")
        assert answer.notes == (notes[0],)
    if "redact_names" in options:
        assert "a.bam" not in sent(server)


def test_a_stream_has_it_again(asked: Callable[..., Server]) -> None:
    server = asked(True)
    pieces = list(get_model_client().stream("Why?", attachments=[LOG]))
    text = "".join(map(str, pieces))
    assert text == "ERROR: /home/annika/run/a.bam: Permission denied"
    last = pieces[-1]
    assert isinstance(last, StreamChunk)
    assert last.completion
    assert last.completion.text == text
    assert not any(secret in sent(server) for secret in SECRETS)


@pytest.mark.parametrize("sender", ["direct", "litellm"])
def test_a_structured_answer_has_it_again(asked: Callable[..., Server], sender: Any) -> None:
    server = asked(True, json_schema=True)
    answer = get_model_client().complete(LOG, response_model=Found, sender=sender)
    assert answer.parsed.owner == "/home/annika"
    assert not any(secret in sent(server) for secret in SECRETS)


def test_a_repair_shows_nothing_either(net: Loopback, waterfall: Write) -> None:
    texts = ['{"owner": 7, "of": "<home-1>"}', '{"owner": "<home-1>"}']
    server = net.serve(answer=lambda _: {"role": "assistant", "content": texts.pop(0)})
    waterfall(first={"base_url": server.url, "trains_on_prompts": True, "free_tier": True})
    answer = get_model_client().complete(LOG, response_model=Found)
    assert answer.parsed.owner == "/home/annika"
    assert len(server.completions) == 2
    assert "annika" not in sent(server)


@pytest.mark.slow
def test_the_gateway_redacts_too(asked: Callable[..., Server], gateway: Callable[[], Any]) -> None:
    server = asked(True)
    gateway()
    answer = get_model_client().complete("Why?", attachments=[LOG], redact_names=["a.bam"])
    assert str(answer) == "ERROR: /home/annika/run/a.bam: Permission denied"
    assert answer.notes[0].startswith("redacted: ")
    assert not any(secret in sent(server) for secret in (*SECRETS, "a.bam"))


def test_the_command_counts_on_stderr(asked: Callable[..., Server], biollm: Any, tmp_path: Path) -> None:
    asked(True)
    (tmp_path / "a.log").write_text(LOG)
    ran = biollm("complete", "Why?", "-f", tmp_path / "a.log", "--redact-name", "a.bam")
    assert ran.out == "ERROR: /home/annika/run/a.bam: Permission denied\n"
    assert "redacted: 1 name, 1 key, 1 e-mail address, 1 home folder\n" in ran.err


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_have_it_again(net: Loopback, waterfall: Write, stream: bool) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "ls", "arguments": '{"path": "<home-1>/run"}'}}
    server = net.serve(answer=lambda _: {"role": "assistant", "content": None, "tool_calls": [call]})
    waterfall(first={"base_url": server.url})
    options: Any = {"tools": [{"type": "function", "function": {"name": "ls"}}], "redact": True}
    client = get_model_client()
    if stream:
        pieces = [piece for piece in client.stream(LOG, **options) if isinstance(piece, StreamChunk)]
        called = next(p for p in pieces if p.kind == "tool_call").chunk["choices"][0]["delta"]["tool_calls"][0]
    else:
        called = client.complete(LOG, **options).tool_calls[0]
    assert json.loads(called["function"]["arguments"]) == {"path": "/home/annika/run"}
    assert not any(secret in sent(server) for secret in SECRETS)
