"""Several deployments answer at once, and one answer comes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from behaviours import HANG, HTTP_500, HTTP_503, Behaviour
from provider import Json, Loopback
from pydantic import BaseModel, model_validator

from biollm._runtime import ledger
from biollm.client import Client, CompletionError, UnknownNameError, UsageError, get_model_client

Write = Callable[..., Path]


class Diagnosis(BaseModel):
    category: Literal["memory", "disk", "software"]
    cause: str
    retry: bool


def says(category: str, cause: str = "?", retry: bool = True) -> str:
    return json.dumps({"category": category, "cause": cause, "retry": retry})


def ensemble(net: Loopback, waterfall: Write, *texts: str | Behaviour) -> Client:
    """Return a client of one provider per member: a text to answer with, or a failure."""
    servers = [net.serve(text=each) if isinstance(each, str) else net.serve(then=each) for each in texts]
    waterfall(**{f"m{at}": server for at, server in enumerate(servers, 1)})
    return get_model_client(sender="direct")


def test_messages_are_asked_too(net: Loopback, waterfall: Write) -> None:
    client = ensemble(net, waterfall, "yes", "yes", "yes")
    assert client.ensemble(messages=[{"role": "user", "content": "Is it?"}]).text == "yes"


def test_a_field_of_any_value_is_voted_on(net: Loopback, waterfall: Write) -> None:
    client = ensemble(net, waterfall, *['{"a": 1}'] * 3)
    schema = {"type": "object", "properties": {"a": True}, "required": ["a"]}
    assert client.ensemble("Why?", response_model=schema).by_field == {"a": 1.0}


VOTES = [
    # answers, the result's category, agreement as a whole, by field
    pytest.param([says("memory", "a"), says("memory", "b"), says("disk", "c")], "memory", 2 / 3, id="majority"),
    pytest.param([says("disk"), says("memory"), says("Memory ")[:0] + says("memory")], "memory", 2 / 3, id="outvoted"),
    pytest.param([says("disk"), says("memory"), says("software")], "disk", 1 / 3, id="a tie goes to the first"),
    pytest.param([says("memory")] * 3, "memory", 1.0, id="all agree"),
]


@pytest.mark.parametrize(("texts", "category", "agreement"), VOTES)
def test_the_majority_decides_each_field(
    net: Loopback, waterfall: Write, texts: list[str], category: str, agreement: float
) -> None:
    answer = ensemble(net, waterfall, *texts).ensemble("Why?", response_model=Diagnosis)
    assert isinstance(answer.parsed, Diagnosis)
    assert answer.parsed.category == category
    assert answer.agreement == pytest.approx(agreement)
    assert answer.by_field["category"] == pytest.approx(agreement)
    assert json.loads(answer.raw.choices[0].message.content)["category"] == category, "OpenAI's JSON says the same"
    assert f"{round(agreement * 3)} of 3 say category = {category}" in answer.reason


def test_fields_are_voted_on_one_by_one(net: Loopback, waterfall: Write) -> None:
    texts = [says("memory", "x", False), says("disk", "full disk", True), says("memory", "heap", True)]
    answer = ensemble(net, waterfall, *texts).ensemble("Why?", response_model=Diagnosis)
    assert answer.parsed == Diagnosis(category="memory", cause="heap", retry=True), "the sentence of the best member"
    assert answer.agreement == pytest.approx(1 / 3), "one member agrees in all fields with few values"
    assert answer.by_field == {"category": 2 / 3, "cause": 1 / 3, "retry": 2 / 3}


class Matched(BaseModel):
    tool: Literal["star", "bwa"]
    option: Literal["star-a", "bwa-a", "bwa-b"]
    sure: Literal["yes", "no"]

    @model_validator(mode="after")
    def _match(self) -> Matched:
        assert self.option.startswith(self.tool)
        return self


def test_fields_that_do_not_match_together_are_not_mixed(net: Loopback, waterfall: Write) -> None:
    texts = [
        json.dumps({"tool": tool, "option": option, "sure": sure})
        for tool, option, sure in (("bwa", "bwa-a", "no"), ("bwa", "bwa-b", "yes"), ("star", "star-a", "yes"))
    ]
    answer = ensemble(net, waterfall, *texts).ensemble("Which?", response_model=Matched)
    assert answer.parsed == Matched(tool="bwa", option="bwa-b", sure="yes")
    assert json.loads(answer.text)["option"] == "bwa-b"


def test_a_json_schema_gives_plain_data(net: Loopback, waterfall: Write) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = ensemble(net, waterfall, '{"n": 1}', '{"n": 2}', '{"n": 2}').ensemble("?", response_model=schema)
    assert answer.parsed == {"n": 2}
    assert answer.reason == "2 of 3 say n = 2"


def test_a_text_may_be_voted_on(net: Loopback, waterfall: Write) -> None:
    answer = ensemble(net, waterfall, "No", "Yes.", "yes").ensemble("Is it?", method="vote")
    assert (answer.text, answer.agreement) == ("Yes.", pytest.approx(2 / 3))


def test_a_judge_chooses_among_texts_and_says_why(net: Loopback, waterfall: Write) -> None:
    judge = net.serve(text=json.dumps({"answer": 2, "reason": "It names the tool."}))
    waterfall(m1=net.serve(text="one"), m2=net.serve(text="two"), j={"base_url": judge.url, "models": ["judge"]})
    answer = get_model_client(sender="direct").ensemble(
        [{"role": "user", "content": "Why did it fail?"}], members=["m1/small", "m2/small"], judge="judge"
    )
    assert (answer.text, answer.reason, answer.deployment) == ("two", "It names the tool.", "m2/small")
    asked = judge.completions[0].body["messages"][-1]["content"]
    assert "Why did it fail?" in asked and "## Answer 1\none" in asked and "## Answer 2\ntwo" in asked
    assert answer.usage.completion_tokens > sum(
        member.answer.usage.completion_tokens
        for member in answer.members
        if not isinstance(member.answer, CompletionError)
    ), "the judge's tokens count"


@pytest.mark.parametrize(
    ("verdict", "why"),
    [(HTTP_500, "did not answer"), ('{"answer": 7, "reason": "?"}', "did not answer")],
    ids=["down", "names no answer"],
)
def test_without_a_judge_the_first_answer_stands(
    net: Loopback, waterfall: Write, verdict: str | Behaviour, why: str
) -> None:
    judge = net.serve(text=verdict) if isinstance(verdict, str) else net.serve(then=verdict)
    waterfall(m1=net.serve(text="one"), m2=net.serve(text="two"), j={"base_url": judge.url, "models": ["judge"]})
    answer = get_model_client(sender="direct").ensemble("?", members=["m1/small", "m2/small"], judge="judge")
    assert answer.text == "one"
    assert why in answer.reason


def test_a_judge_without_valid_json_is_named_and_its_attempts_count(net: Loopback, waterfall: Write) -> None:
    judge = {"base_url": net.serve(text="no JSON").url, "models": ["judge"]}
    embedded = {"type": "embedded", "models": ["smollm2-135m"]}
    waterfall(m1=net.serve(text="one"), m2=net.serve(text="two"), j=judge, embedded=embedded)
    for named in ("judge", None):
        client = get_model_client(sender="direct")
        answer = client.ensemble("?", members=["m1/small", "m2/small"], judge=named)
        assert "the answer does not match the schema" in answer.reason
        assert "allow_degraded" not in answer.reason
        assert {"j/judge": "failed"}.items() <= {each.deployment: each.outcome for each in answer.attempts}.items()


def test_equal_texts_need_no_judge(net: Loopback, waterfall: Write) -> None:
    client = ensemble(net, waterfall, "same", "Same.", "same")
    assert client.ensemble("?").agreement == 1


def test_failures_are_tolerated_down_to_the_quorum(net: Loopback, waterfall: Write) -> None:
    client = ensemble(net, waterfall, "yes", HTTP_503, "yes")
    answer = client.ensemble("?", method="vote")
    assert answer.agreement == 1
    assert [isinstance(each.answer, CompletionError) for each in answer.members] == [False, True, False]
    assert {attempt.outcome for attempt in answer.attempts} == {"ok", "failed"}
    ledger().refresh()
    with pytest.raises(
        CompletionError, match=r"2 of 3 members answered; at least 3 must.\n  m2/small: .*503"
    ) as caught:
        ensemble(net, waterfall, "yes", HTTP_503, "yes").ensemble(
            "?", method="vote", quorum=3, members=["m1/small", "m2/small", "m3/small"]
        )
    assert caught.value.attempts


def test_late_members_are_left_out(net: Loopback, waterfall: Write) -> None:
    client = ensemble(net, waterfall, "yes", "yes", HANG)
    started = time.monotonic()
    answer = client.ensemble("?", method="vote", deadline=1.5)
    assert time.monotonic() - started < 10
    assert [str(each.answer) for each in answer.members][2] == "No answer within 1.5 s."


def test_members_are_asked_at_once(net: Loopback, waterfall: Write) -> None:
    servers = [net.serve(then=HANG) for _ in range(3)]
    waterfall(m1=servers[0], m2=servers[1], m3=servers[2])
    with pytest.raises(CompletionError, match="0 of 3 members answered; at least 2 must"):
        get_model_client(sender="direct").ensemble("?", deadline=1)
    assert [len(server.completions) for server in servers] == [1, 1, 1], "none waited for another's answer"


def test_one_per_account_comes_first_and_few_deployments_are_asked_again(net: Loopback, waterfall: Write) -> None:
    one, two = net.serve(text="yes"), net.serve(text="yes")
    waterfall(m1={"base_url": one.url, "models": ["a", "b"]}, m2={"base_url": two.url, "models": ["c"]})
    client = get_model_client(sender="direct")
    names = [each.name for each in client.ensemble("?", members=2, method="vote").members]
    assert names == ["m1/a", "m2/c"]
    names = [each.name for each in client.ensemble("?", members=4, method="vote").members]
    assert names == ["m1/a", "m2/c", "m1/b", "m1/a"]


def test_the_embedded_model_is_no_member(net: Loopback, waterfall: Write) -> None:
    waterfall(m1=net.serve(text="yes"), embedded={"type": "embedded", "models": ["smollm2-135m"]})
    answer = get_model_client(sender="direct").ensemble("?", members=3, method="vote")
    assert {each.name for each in answer.members} == {"m1/small"}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"members": ["nothing"]}, UnknownNameError, "nothing"),
        ({"members": 0}, UsageError, "1 to 16 members, not 0"),
        ({"members": 17}, UsageError, "1 to 16 members, not 17"),
        ({"members": [1]}, UsageError, "it must be a number, or a list of models"),
        ({"members": "m1"}, UsageError, "it must be a number, or a list of models"),
        ({"judge": "nothing"}, UnknownNameError, "nothing"),
        ({"members": []}, UsageError, "1 to 16 members, not 0"),
        ({"quorum": 4}, UsageError, "quorum is 4; with 3 members it must be 1 to 3"),
        ({"method": "average"}, UsageError, "method is 'average'; it must be 'vote' or 'judge'"),
        ({"temprature": 1}, UsageError, "no option 'temprature'"),
        ({"local_only": True}, CompletionError, "No deployment is available for an ensemble"),
    ],
    ids=lambda each: str(each)[:30] if isinstance(each, dict) else "",
)
def test_what_cannot_be_asked_is_one_sentence(
    net: Loopback, waterfall: Write, options: Json, error: type[Exception], match: str
) -> None:
    waterfall(m1={"base_url": "https://ai.example.org/v1"})
    with pytest.raises(error, match=match):
        get_model_client(sender="direct").ensemble("?", **options)


async def _async(client: Client) -> Any:
    return await client.aensemble("?", method="vote")


def test_it_is_there_for_async_callers(net: Loopback, waterfall: Write) -> None:
    import asyncio

    assert asyncio.run(_async(ensemble(net, waterfall, "a", "a", "b"))).text == "a"


def test_the_command_line_asks_one(net: Loopback, waterfall: Write, biollm: Any) -> None:
    ensemble(net, waterfall, "No", "Yes", "yes")
    ran = biollm("complete", "Is it?", "--ensemble", "m2/small,m3/small")
    assert (ran.code, ran.out) == (0, "Yes\n")
    assert "ensemble: 2 of 2 give this answer" in ran.err
    found = biollm("complete", "Is it?", "--ensemble", "m2/small,m3/small", "--json").json
    assert [each["name"] for each in found["members"]] == ["m2/small", "m3/small"]
    assert found["agreement"] == 1
    assert biollm("complete", "Is it?", "--ensemble", "nothing").code == 2
