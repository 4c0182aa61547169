"""What a call takes is checked before anything is sent, and typed for the checkers that users run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from provider import Loopback
from pydantic import BaseModel

from biollm.client import Completion, StreamChunk, StreamRestarted, UsageError, get_model_client
from biollm.client.options import check
from biollm.types import Attempt

Write = Any
NAN, INF = float("nan"), float("inf")
SECONDS = "it must be a finite number of seconds above 0."


class Diagnosis(BaseModel):
    cause: str


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number from 0 to 2."),
        ({"temperature": 9}, "temperature is 9; it must be a number from 0 to 2."),
        ({"temperature": True}, "temperature is True; it must be a number from 0 to 2."),
        ({"extra": {"temperature": 9}}, "extra.temperature is 9; it must be a number from 0 to 2."),
        ({"max_tokens": -1}, "max_tokens is -1; it must be a whole number of at least 1."),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number of at least 1."),
        ({"max_tokens": "5"}, "max_tokens is '5'; it must be a whole number of at least 1."),
        ({"max_retries": -1}, "max_retries is -1; it must be a whole number of at least 0."),
        ({"deadline": NAN}, f"deadline is nan; {SECONDS}"),
        ({"timeout": 0}, f"timeout is 0; {SECONDS}"),
        ({"wait": INF}, f"wait is inf; {SECONDS}"),
        ({"patience": "2"}, "patience is '2'; it must be a number of seconds, 0 or more."),
        ({"patience": -1}, "patience is -1; it must be a number of seconds, 0 or more."),
        ({"on_interrupt": "again"}, "on_interrupt is 'again'; it must be one of raise, restart, splice."),
        ({"sender": "mine"}, "sender is 'mine'; it must be litellm or direct."),
        ({"data_policy": "private"}, "data_policy is 'private'; it must be one of any, no_training, local_only."),
        ({"fallback": None}, "fallback is None; it must be True or False."),
        ({"local_only": "yes"}, "local_only is 'yes'; it must be True or False."),
        ({"tags": "a=b"}, "tags is 'a=b'; it must be a mapping."),
        ({"extra": ["stop"]}, "extra is ['stop']; it must be a mapping."),
        ({"response_model": int}, "response_model is <class 'int'>; it must be a pydantic class or a JSON Schema (a mapping)."),
        ({"response_model": "Diagnosis"}, "response_model is 'Diagnosis'; it must be a pydantic class or a JSON Schema (a mapping)."),
        ({"on_send": "print"}, "on_send is 'print'; it must be a function."),
        ({"system": b"Be brief"}, "system is b'Be brief'; it must be a string."),
        ({"model": 4}, "model is 4; it must be a string."),
        ({"response_model": Diagnosis(cause="x")}, "response_model is Diagnosis(cause='x'); it must be a pydantic class or a JSON Schema (a mapping)."),
        ({"tool_choice": 3}, "tool_choice is 3; it must be a string or a mapping."),
        ({"seed": 3}, "There is no option 'seed'. Pass a further argument of the API as extra={'seed': ...}."),
        ({"temprature": 0.2}, "There is no option 'temprature'. Did you mean temperature?"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "A prompt and messages are given. Pass one of them."),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_with_its_value_and_nothing_is_sent(
    net: Loopback, waterfall: Write, option: Any, message: str
) -> None:
    waterfall(first=(first := net.serve()))
    with pytest.raises(UsageError) as caught:
        get_model_client().complete("hi", **option)
    assert f"{caught.value} {caught.value.hint or ''}".strip() == message
    if option.keys() != {"messages"}:
        with pytest.raises(UsageError):
            get_model_client(**option).complete("hi")
    assert first.requests == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "The prompt is missing"),
        ("", "The prompt is empty."),
        (" \n", "The prompt is empty."),
        ([], "There are no messages."),
        (Path("/data/a.log"), "Pass its text, path.read_text(), or the file beside a question: attachments=[path]."),
        (b"log", "Pass text: data.decode()."),
        ({"role": "user", "content": "hi"}, "Pass a list of messages: [message]."),
        ([{"role": "user", "content": Path("a.log")}], "messages[0].content is a PosixPath"),
        ([{"role": "User", "content": "hi"}], "messages[0].role is 'User'. Did you mean 'user'?"),
    ],
)
def test_what_is_no_prompt_is_refused(waterfall: Write, prompt: Any, message: str) -> None:
    waterfall(first="https://first.invalid/v1")
    client = get_model_client()
    for call in (
        client.complete,
        lambda given: next(client.stream(given)),
        lambda given: asyncio.run(client.acomplete(given)),
    ):
        with pytest.raises(UsageError) as caught:
            call(prompt)
        assert message in f"{caught.value} {caught.value.hint or ''}"


def test_one_text_is_no_list_of_prompts(waterfall: Write) -> None:
    waterfall(first="https://first.invalid/v1")
    for wrong in ("abc", b"abc", None, {"role": "user", "content": "abc"}):
        with pytest.raises(UsageError, match="prompts must be a list of prompts"):
            get_model_client().complete_many(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"prompts\[1\]: The prompt is empty\."):
        get_model_client().complete_many(["a", ""])
    with pytest.raises(UsageError, match=r"^suffix is 3; it must be a string\."):
        get_model_client().fill_in_middle("a", 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"concurrency is 'many'; it must be a whole number of at least 1\."):
        get_model_client().complete_many(["abc"], concurrency="many")  # type: ignore[arg-type]


def test_scalars_of_numpy_are_taken() -> None:
    given: Any = {
        "temperature": np.float32(0.5),
        "max_tokens": np.int64(3),
        "fallback": np.bool_(False),
        "timeout": None,
    }
    assert json.dumps(check(given)) == '{"temperature": 0.5, "max_tokens": 3, "fallback": false, "timeout": null}'


def test_messages_and_prompt_can_be_named(net: Loopback, waterfall: Write) -> None:
    waterfall(first=(first := net.serve(text="fine")))
    client, messages = get_model_client(sender="direct"), [{"role": "user", "content": "hi"}]
    assert str(client.complete(messages=messages)) == str(client.complete(prompt="hi")) == "fine"
    assert "".join(map(str, client.stream(messages=messages))) == "fine"
    assert [sent.body["messages"] for sent in first.requests] == [messages] * 3
    with pytest.raises(UsageError, match="There is no option 'messages'"):
        get_model_client(messages=messages)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BIOLLM_TAGS", "foo", "BIOLLM_TAGS has 'foo', which is not key=value."),
        ("BIOLLM_TAGS", "a=b,=c", "BIOLLM_TAGS has '=c', which is not key=value."),
        ("BIOLLM_LOCAL_ONLY", "maybe", "BIOLLM_LOCAL_ONLY is 'maybe'; it must be 1 or 0."),
        ("BIOLLM_SENDER", "x", "BIOLLM_SENDER is 'x'; it must be litellm or direct."),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(
    waterfall: Write, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    waterfall(first="https://first.invalid/v1")
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        get_model_client().complete("hi")
    assert str(caught.value) == message


def test_an_answer_and_its_pieces_format_as_text() -> None:
    answer = Completion(text="yes", provider="p", account="default", model="m", deployment="p/m")
    assert (str(answer), f"{answer:>5}|{answer!s:<4}|{answer}") == ("yes", "  yes|yes |yes")
    assert f"{StreamChunk('a'):3}|{StreamRestarted(Attempt('p/m', 'failed')):2}|" == "a  |  |"
    assert bool(Completion(text="", provider="p", account="default", model="m", deployment="p/m"))


SCRIPT = """
import asyncio

from pydantic import BaseModel

from biollm.client import Completion, CompletionError, StreamChunk, get_model_client


class Diagnosis(BaseModel):
    cause: str
    fix: str


def diagnose(log: str) -> Diagnosis:
    answer = get_model_client().complete(log, response_model=Diagnosis, temperature=0.2, provider="lab")
    return answer.parsed


def kept(answer: Completion[Diagnosis]) -> str:
    return f"{answer:>30} {answer.parsed.cause}"


def untyped(answer: Completion) -> str:
    return answer.text


async def both() -> str:
    client = get_model_client(model="m", local_only=True)
    found = await client.acomplete(messages=[{"role": "user", "content": "hi"}], response_model=Diagnosis)
    cause: str = found.parsed.cause
    plain = await client.acomplete(prompt="hi")
    return cause + plain.text


def many(logs: list[str]) -> list[str]:
    answers = get_model_client().complete_many(logs, response_model=Diagnosis, concurrency=4)
    return [each.parsed.fix if not isinstance(each, CompletionError) else str(each) for each in answers]


def streamed(text: str) -> None:
    for piece in get_model_client().stream(text):
        print(piece, end="")
        if isinstance(piece, StreamChunk) and piece.completion:
            print(piece.completion.cost_usd)


schema = {"type": "object", "properties": {"cause": {"type": "string"}}}
print(get_model_client().complete("hi", response_model=schema).parsed["cause"])
asyncio.run(both())
"""
WRONG = '''
get_model_client().complete("hi", response_model=Diagnosis).parsed.nope
get_model_client().complete("hi", temperature="hot")
'''  # fmt: skip


@pytest.mark.slow
def test_pyright_in_strict_mode_checks_a_users_script(tmp_path: Path) -> None:
    settings = {"typeCheckingMode": "strict", "include": ["*.py"], "reportUnusedExpression": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(SCRIPT + WRONG)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    lines = [(Path(each["file"]).name, each["range"]["start"]["line"]) for each in found["generalDiagnostics"]]
    last = len((SCRIPT + WRONG).splitlines())
    assert sorted({line for _, line in lines}) == [last - 2, last - 1], found
    assert {name for name, _ in lines} == {"wrong.py"}
