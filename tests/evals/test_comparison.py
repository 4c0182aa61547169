"""Several models are asked the same, each alone, and the report says what a difference is worth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from behaviours import HANG, HTTP_400, HTTP_500, OK, limited
from provider import Json, Loopback, Server

from biollm import evals
from biollm.client import UsageError
from biollm.evals import inputs, scoring
from biollm.evals.report import Pair, Report, rows
from biollm.evals.report import lines as report_lines

Write = Callable[..., Path]
DIAGNOSIS = Path(__file__).parents[2] / "examples" / "diagnosis"
EXPECTED = {line["file"]: line["category"] for line in map(json.loads, (DIAGNOSIS / "expected.jsonl").open())}


def knows(*files: str, otherwise: str = "other") -> Callable[[Json], Json]:
    """Answer with the category that is expected for these logs of the example, and another for the rest."""

    def answer(body: Json) -> Json:
        text = str(body["messages"])
        name = next(name for name in EXPECTED if f"--- {name} ---" in text)
        found = {"category": EXPECTED[name] if name in files or not files else otherwise, "cause": "?"}
        return {"role": "assistant", "content": json.dumps(found)}

    return answer


def arms(net: Loopback, waterfall: Write, **answers: Callable[[Json], Json] | str) -> dict[str, Server]:
    """Set up a provider for each arm, with the arm's name as its one model."""
    servers = {
        name: net.serve(text=each) if isinstance(each, str) else net.serve(answer=each)
        for name, each in answers.items()
    }
    waterfall(**{name: {"base_url": each.url, "models": [f"model-{name}"]} for name, each in servers.items()})
    return servers


def lines(tmp_path: Path, records: Sequence[Json]) -> Path:
    (path := tmp_path / "inputs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def pair(found: Report) -> Pair:
    (only,) = found.pairs
    return only


# --- who is asked --------------------------------------------------------------------------------------------------


def test_every_arm_gets_every_input_and_none_but_it_answers(net: Loopback, waterfall: Write) -> None:
    servers = arms(net, waterfall, a=knows(), b=knows(*list(EXPECTED)[:12]))
    found = evals.compare([DIAGNOSIS], ["model-a", "model-b"])
    assert {name: len(each.completions) for name, each in servers.items()} == {"a": 24, "b": 24}
    texts = [sorted(str(each.body["messages"]) for each in server.completions) for server in servers.values()]
    assert texts[0] == texts[1], "the same text"
    right = 12 + sum(category == "other" for category in list(EXPECTED.values())[12:])
    assert [(arm.score, arm.answers, arm.errors) for arm in found.arms] == [(1, 24, 0), (right / 24, 24, 0)]
    assert (pair(found).other_wins, pair(found).one_wins, pair(found).inputs) == (0, 24 - right, 24)
    assert found.inputs == 24


def test_the_arms_take_turns(net: Loopback, waterfall: Write) -> None:
    servers = arms(net, waterfall, a=knows(), b=knows())
    evals.compare([DIAGNOSIS], ["model-a", "model-b"], concurrency=1, limit=4)
    asked = sorted((each.at, name) for name, server in servers.items() for each in server.completions)
    assert "".join(name for _, name in asked) == "abbaabba"


def test_an_arm_that_fails_is_an_error_and_never_another_model(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    ok, down = net.serve(text="yes"), net.serve(then=HTTP_500)
    waterfall(a={"base_url": down.url, "models": ["a"]}, b={"base_url": ok.url, "models": ["b"]})
    found = evals.compare([lines(tmp_path, [{"input": "Is it?", "target": "yes"}])], ["a", "b"], wait=0)
    assert [(arm.answers, arm.errors) for arm in found.arms] == [(0, 1), (1, 0)]
    assert len(ok.completions) == 1
    assert pair(found).inputs == 0


def test_an_arm_at_a_limit_is_waited_for(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    slow, ok = net.serve(limited("1"), text="yes"), net.serve(text="yes")
    waterfall(a={"base_url": slow.url, "models": ["a"]}, b={"base_url": ok.url, "models": ["b"]})
    path = lines(tmp_path, [{"input": "Is it?", "target": "yes"}])
    assert [arm.errors for arm in evals.compare([path], ["a", "b"]).arms] == [0, 0]
    assert [len(each.completions) for each in (slow, ok)] == [2, 1]
    slow.script.append(limited("300"))
    started = time.monotonic()
    assert [arm.errors for arm in evals.compare([path], ["a", "b"], wait=1.0).arms] == [1, 0]
    assert time.monotonic() - started < 30


def test_an_ensemble_is_an_arm(net: Loopback, waterfall: Write) -> None:
    arms(net, waterfall, a=knows(*list(EXPECTED)[:12]), b=knows(), c=knows())
    found = evals.compare([DIAGNOSIS], ["model-a", "ensemble:model-a,model-b,model-c"])
    assert found.arms[1].score == 1
    assert "ensemble:model-a,model-b,model-c is better" in pair(found).sentence


# --- what is asked -------------------------------------------------------------------------------------------------

LINES = [
    # a line of JSONL, id, cluster, question, expected
    ({"input": "q", "target": "t"}, "inputs.jsonl:1", "inputs.jsonl:1", "q", "t"),
    ({"prompt": "q", "expected": 3, "id": "x", "cluster": "c"}, "x", "c", "q", 3),
    ({"messages": [{"role": "user", "content": "q"}]}, "inputs.jsonl:1", "inputs.jsonl:1", [{"role": "user", "content": "q"}], None),
    (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "inputs.jsonl:1", "inputs.jsonl:1", [{"role": "user", "content": "q"}], "a",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("record", "ident", "cluster", "question", "expected"), LINES)
def test_lines_of_several_forms_are_read(
    tmp_path: Path, record: Json, ident: str, cluster: str, question: Any, expected: Any
) -> None:
    (found,), _ = inputs.read([lines(tmp_path, [record])])
    assert (found.id, found.cluster, found.question, found.expected(None)) == (ident, cluster, question, expected)


def test_a_folder_without_jsonl_is_its_files_and_the_inputs_of_one_file_are_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "b.log").write_text("b")
    (tmp_path / "a.log").write_text("a")
    (tmp_path / ".hidden").write_text("no")
    found, _ = inputs.read([tmp_path])
    assert [each.id for each in found] == ["a.log", "b.log"]
    found, _ = inputs.read([lines(tmp_path, [{"file": "a.log", "prompt": each} for each in "xy"])])
    assert len({each.cluster for each in found}) == 1
    assert [each.id for each in found] == ["a.log", "a.log#2"], "each has an answer of its own"


def test_inputs_of_one_name_and_questions_about_one_file_are_told_apart(
    net: Loopback, waterfall: Write, tmp_path: Path
) -> None:
    arms(net, waterfall, a="disk", b="memory")
    for folder in "xy":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.log").write_text(folder)
    path = lines(tmp_path, [{"file": "x/run.log", "prompt": each, "target": each} for each in ("disk", "memory")])
    found = evals.compare([tmp_path / "x", tmp_path / "y", path], ["model-a", "model-b"])
    assert [each.answers for each in found.arms] == [4, 4]
    assert list(found.expected) == ["run.log", "run.log#2", "x/run.log", "x/run.log#2"]
    assert [each.score for each in found.arms] == [0.5, 0.5]


def test_a_line_may_hold_other_ends_of_lines(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    servers = arms(net, waterfall, a="one\u2028two\x85", b="\ud83d")
    path, out = tmp_path / "inputs.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"input": "a\u2028b\x85c"}, ensure_ascii=False))
    for _ in range(2):
        assert [each.answers for each in evals.compare([path], ["model-a", "model-b"], results=out).arms] == [1, 1]
    assert [len(each.completions) for each in servers.values()] == [1, 1]


def test_results_may_go_to_a_pipe(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    arms(net, waterfall, a="x", b="y")
    ours, theirs = os.pipe()
    evals.compare([lines(tmp_path, [{"input": "q"}])], ["model-a", "model-b"], results=f"/proc/self/fd/{theirs}")
    os.close(theirs)
    assert os.read(ours, 1 << 16).count(b"\n") == 2
    os.close(ours)


def test_the_results_in_a_folder_are_no_inputs(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    servers = arms(net, waterfall, a="x", b="y")
    (logs := tmp_path / "logs").mkdir()
    (logs / "run.log").write_text("x")
    for _ in range(2):
        assert evals.compare([logs], ["model-a", "model-b"], results=logs / "out.jsonl").inputs == 1
    assert [len(each.completions) for each in servers.values()] == [1, 1]


WRONG = [
    # content of inputs.jsonl, compare.yaml beside it, the error
    ("{", None, r"inputs.jsonl:1 is not JSON"),
    ("[]", None, r"inputs.jsonl:1 is not a JSON object"),
    ('{"target": "x"}', None, r"inputs.jsonl:1 has no input"),
    ('{"file": "gone.log"}', None, r"inputs.jsonl:1: .*gone.log: no such file"),
    ("", None, "There are no inputs"),
    ('{"input": " "}', None, r"inputs.jsonl:1 has no input"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', None, r"inputs.jsonl:1 has no input"),
    ('{"input": 5}', None, r"inputs.jsonl:1: the input is no text and no list of messages"),
    ('{"messages": {"role": "user"}}', None, r"inputs.jsonl:1: the input is no text"),
    ('{"messages": ["x"]}', None, r"inputs.jsonl:1: the input is no text"),
    (b'{"input": "caf\xe9"}', None, "inputs.jsonl is not UTF-8 text"),
    ('{"input": "x"}', "prompt: [x]", r"compare.yaml: prompt is .*; it must be a text"),
    ('{"input": "x"}', "promt: x", "there is no key 'promt'"),
    ('{"input": "x"}', "- x", "is not a YAML mapping"),
]


@pytest.mark.parametrize(("content", "settings", "problem"), WRONG)
def test_what_cannot_be_read_is_one_sentence(
    tmp_path: Path, content: str | bytes, settings: str | None, problem: str
) -> None:
    (tmp_path / "inputs.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    if settings:
        (tmp_path / "compare.yaml").write_text(settings)
    with pytest.raises(UsageError, match=problem):
        inputs.read([tmp_path])


@pytest.mark.parametrize(
    ("names", "settings", "problem"),
    [
        (["model-a"], {}, "needs two different arms"),
        (["model-a", "model-a"], {}, "needs two different arms"),
        (["model-a", "nothing"], {}, "nothing"),
        (["model-a", "ensemble:model-a,nothing"], {}, "nothing"),
        (["model-a", "model-b"], {"expect": "x", "judge": "model-a"}, "exclude each other"),
        (["model-a", "ensemble:0"], {}, "ensemble:0: an ensemble has 1 to 16 members"),
        (["model-a", "ensemble:17"], {}, "ensemble:17: an ensemble has 1 to 16 members"),
        (["model-a", "model-b"], {"expect": None, "command": "check it"}, "has no {answer}"),
        (["model-a", "model-b"], {"command": "check '{answer}"}, "cannot be read"),
        (["model-a", "model-b"], {"command": "no-such-program {answer}"}, "is not a program here"),
        (["model-a", "model-b"], {"spend_limit": float("nan")}, "spend_limit is nan"),
        (["model-a", "model-b"], {"concurrency": 0}, "concurrency is 0; it must be a whole number of at least 1"),
        (["model-a", "model-b"], {"limit": 0}, "limit is 0; it must be a whole number of at least 1"),
        (["model-a", "model-b"], {"results": "/proc/no/such/folder"}, "folder cannot be written: No such file"),
        (["model-a", "model-b"], {"results": "/proc"}, "/proc cannot be written: Is a directory"),
        (["model-a", "model-b"], {"options": {"temperature": 5}}, "^temperature is 5; it must be a number from 0 to 2"),
        (["model-a", "model-b"], {"schema": {"type": 5}}, "^schema is no JSON Schema"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    net: Loopback, waterfall: Write, tmp_path: Path, names: list[str], settings: Json, problem: str
) -> None:
    servers = arms(net, waterfall, a="x", b="x")
    with pytest.raises(UsageError, match=problem):
        evals.compare([lines(tmp_path, [{"input": "q"}])], names, **settings)
    assert not any(each.completions for each in servers.values())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ": The prompt is empty"),
        (b"\x1f\x8b\x08?", ": The prompt is empty"),
        (b"\x89PNG\r\n\x1a\n", " is not text"),
    ],
)
def test_an_input_that_cannot_be_asked_is_named(
    net: Loopback, waterfall: Write, tmp_path: Path, content: bytes, problem: str
) -> None:
    arms(net, waterfall, a="x", b="x")
    (tmp_path / "run.log").write_bytes(content)
    with pytest.raises(UsageError, match=rf"^run\.log{problem}") as caught:
        evals.compare([tmp_path / "run.log"], ["model-a", "model-b"])
    assert ("To leave it out" in (caught.value.hint or "")) == ("not text" in problem)


def test_a_full_disk_is_named_with_the_file(net: Loopback, waterfall: Write, tmp_path: Path, biollm: Any) -> None:
    arms(net, waterfall, a="x", b="x")
    (tmp_path / "run.log").write_text("why?")
    ran = biollm("compare", tmp_path / "run.log", "--a", "model-a", "--b", "model-b", "-o", "/dev/full")
    assert (ran.code, "biollm: /dev/full: No space left on device\n" in ran.err) == (1, True), ran.err


# --- how answers are scored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "score"), [("out of memory", 1.0), ("OUT of  memory.", 1.0), ("disk", 0.0), (["disk", "memory"], 1.0)]
)
def test_a_text_must_contain_what_is_expected(
    net: Loopback, waterfall: Write, tmp_path: Path, expected: str | list[str], score: float
) -> None:
    arms(net, waterfall, a="It ran out of memory.", b="?")
    found = evals.compare([lines(tmp_path, [{"input": "q", "target": expected}])], ["model-a", "model-b"])
    assert found.arms[0].score == score


@pytest.mark.parametrize(
    ("command", "scores"),
    [
        ("grep -q yes {answer}", [1.0, 0.0]),
        (f"{sys.executable} -c 'import sys; print(len(open(sys.argv[1]).read()))' {{answer}}", [3.0, 2.0]),
        ("diff -q {answer} {expected}", [1.0, 0.0]),
        ("sh -c 'exit 3' {answer}", [0.0, 0.0]),
        ("sh -c 'echo nan; exit 3' {answer}", [0.0, 0.0]),
    ],
)
def test_a_command_scores_by_its_exit_code_or_its_last_number(
    net: Loopback, waterfall: Write, tmp_path: Path, command: str, scores: list[float]
) -> None:
    arms(net, waterfall, a="yes", b="no")
    path = lines(tmp_path, [{"input": "q; rm -rf /", "target": "yes"}])
    found = evals.compare([path], ["model-a", "model-b"], command=command)
    assert [arm.score for arm in found.arms] == scores


VERDICTS = [("1", "2", "first", False), ("2", "1", "second", False), ("tie", "tie", "tie", False)]
VERDICTS += [("1", "1", "tie", True), ("2", "2", "tie", True), ("1", "tie", "tie", False)]


@pytest.mark.parametrize(("straight", "swapped", "winner", "contradicted"), VERDICTS)
def test_a_judge_must_choose_the_same_in_both_orders(
    straight: str, swapped: str, winner: str, contradicted: bool
) -> None:
    assert scoring.verdict(straight, swapped) == (winner, contradicted)


@pytest.mark.parametrize("named", ["j", "ensemble:j"])
def test_a_judge_sees_each_pair_twice(net: Loopback, waterfall: Write, tmp_path: Path, named: str) -> None:
    def judging(body: Json) -> Json:
        text = str(body["messages"][-1]["content"])
        winner = "1" if text.index("good") < text.index("bad") else "2"
        return {"role": "assistant", "content": json.dumps({"winner": winner, "reason": "?"})}

    judge = net.serve(answer=judging)
    a, b = net.serve(text="bad"), net.serve(text="good")
    waterfall(**{n: {"base_url": s.url, "models": [n]} for n, s in {"a": a, "b": b, "j": judge}.items()})
    path = lines(tmp_path, [{"input": f"question {n}"} for n in range(6)])
    found = evals.compare([path], ["a", "b"], judge=named, results=tmp_path / "out.jsonl")
    assert len(judge.completions) == 12
    assert (pair(found).other_wins, pair(found).contradicted) == (6, 0)
    assert pair(found).sentence.startswith("b is better: 6 to 0 of 6 inputs (p = 0.031)")
    evals.compare([path], ["a", "b"], judge=named, results=tmp_path / "out.jsonl")
    assert len(judge.completions) == 12, "verdicts are kept, too"


# --- going on, and stopping ----------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    servers = arms(net, waterfall, a="x", b="x")
    path, out = lines(tmp_path, [{"input": f"question {n}"} for n in range(8)]), tmp_path / "out.jsonl"
    evals.compare([path], ["model-a", "model-b"], results=out, limit=5)
    kept = out.read_text().splitlines()
    out.write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:30])  # the last line was cut off
    found = evals.compare([path], ["model-a", "model-b"], results=out)
    assert sum(len(each.completions) for each in servers.values()) == 10 + 6 + 1
    assert [arm.answers for arm in found.arms] == [8, 8]
    again = evals.compare([path], ["model-a", "model-b"], results=out)
    assert sum(len(each.completions) for each in servers.values()) == 17
    assert again.arms == found.arms
    evals.compare([path], ["model-a", "model-b"], results=out, system="Be brief.")
    assert sum(len(each.completions) for each in servers.values()) == 17 + 16, "another question has other answers"


def test_a_file_of_results_belongs_to_one_run_at_a_time(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    path, out = lines(tmp_path, [{"input": "q"}]), tmp_path / "out.jsonl"

    def while_asked(_body: Json) -> Json:
        with pytest.raises(UsageError, match=r"out\.jsonl is in use by another comparison"):
            evals.compare([path], ["model-a", "model-b"], results=out)
        return {"role": "assistant", "content": "x"}

    servers = arms(net, waterfall, a=while_asked, b=while_asked)
    for _ in range(2):
        assert [each.answers for each in evals.compare([path], ["model-a", "model-b"], results=out).arms] == [1, 1]
    assert [len(each.completions) for each in servers.values()] == [1, 1]


def test_what_was_answered_is_scored_anew(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    servers = arms(net, waterfall, a="yes", b="no")
    out, names = tmp_path / "out.jsonl", ["model-a", "model-b"]
    twice = [{"input": "q", "target": "no", "id": each} for each in "xy"]
    assert [arm.score for arm in evals.compare([lines(tmp_path, twice)], names, results=out).arms] == [0, 1]
    corrected = [{**each, "target": "yes"} for each in twice]
    found = evals.compare([lines(tmp_path, corrected)], names, results=out)
    assert [(arm.score, arm.answers) for arm in found.arms] == [(1, 2), (0, 2)]
    assert [len(each.completions) for each in servers.values()] == [2, 2]


def test_a_corrected_target_scores_the_answers_anew(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    servers, out = arms(net, waterfall, a="disk", b="memory"), tmp_path / "out.jsonl"
    for target, scores in (("disk", [1, 0]), ("memory", [0, 1]), ("", [None, None])):
        path = lines(tmp_path, [{"input": "q", "target": target}])
        found = evals.compare([path], ["model-a", "model-b"], results=out)
        assert [each.score for each in found.arms] == scores
    assert [len(each.completions) for each in servers.values()] == [1, 1]


def test_errors_are_asked_again(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    a, b = net.serve(then=HTTP_400), net.serve(text="x")  # which rests nothing
    waterfall(a={"base_url": a.url, "models": ["a"]}, b={"base_url": b.url, "models": ["b"]})
    path, out = lines(tmp_path, [{"input": "q"}]), tmp_path / "out.jsonl"
    assert evals.compare([path], ["a", "b"], results=out, wait=0).arms[0].errors == 1
    assert [json.loads(line)["arm"] for line in out.open()] == ["b"]
    a.behaviour = OK
    assert evals.compare([path], ["a", "b"], results=out, wait=0).arms[0].answers == 1
    assert len(b.completions) == 1


def test_a_file_of_the_users_is_not_appended_to(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    arms(net, waterfall, a="x", b="x")
    path = lines(tmp_path, [{"input": "q"}])
    content = path.read_text()
    with pytest.raises(UsageError, match="holds no results of a comparison"):
        evals.compare([path], ["model-a", "model-b"], results=path)
    assert path.read_text() == content


def test_it_stops_at_the_spend_limit(net: Loopback, waterfall: Write, tmp_path: Path, paid: Any) -> None:
    server = net.serve(text="x")
    waterfall(a=paid(server, "a"), b=paid(server, "b", "gpt-4o"))
    path = lines(tmp_path, [{"input": f"question {n}"} for n in range(20)])
    found = evals.compare([path], ["a/gpt-4o-mini", "b/gpt-4o"], spend_limit=1e-9, concurrency=1)
    assert "the spend limit of 0.000000 USD is reached" in found.stopped
    assert len(server.completions) == 1


def test_with_a_spend_limit_of_0_only_what_is_free_is_sent(
    net: Loopback, waterfall: Write, tmp_path: Path, paid: Any, biollm: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    server, free = net.serve(text="x"), net.serve(text="y")
    costs = {"costs": {"per_million_tokens": {"f": 0}}}
    waterfall(costs, a=paid(server, "a"), f={"base_url": free.url, "models": ["f", "g"]})
    path = lines(tmp_path, [{"input": f"question {n}", "target": "y"} for n in range(4)])
    ran = biollm("compare", "--a", "a/gpt-4o-mini", "--b", "f/f", path, "--spend-limit", "0")
    assert (ran.code, len(server.completions)) == (1, 0)
    assert "Stopped: the spend limit of 0.000000 USD is reached" in ran.out
    assert biollm("compare", "--a", "f/f", "--b", "f/g", path, "--spend-limit", "0").code == 0
    assert (
        biollm("compare", "--a", "f/f", "--b", "f/g", path, "--spend-limit", "0", "--judge", "a/gpt-4o-mini").code == 0
    )
    assert not server.completions, "equal answers need no judge"


def test_a_spend_limit_needs_known_prices(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    servers = arms(net, waterfall, a="x", b="x")
    with pytest.raises(UsageError, match=r"The price of model-a is unknown, so the spend limit cannot be kept\."):
        evals.compare([lines(tmp_path, [{"input": "q"}])], ["model-a", "model-b"], spend_limit=1)
    assert not any(each.completions for each in servers.values())


def test_what_is_paid_for_without_an_answer_counts(net: Loopback, waterfall: Write, tmp_path: Path, paid: Any) -> None:
    good, bad = net.serve(text='{"n": 1}'), net.serve(text="no JSON")
    waterfall(a=paid(good, "a"), b=paid(bad, "b", "gpt-4o"))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    path = lines(tmp_path, [{"input": f"question {n}", "n": 1} for n in range(12)])
    arms = ["a/gpt-4o-mini", "b/gpt-4o"]
    found = evals.compare([path], arms, schema=schema, expect="n")
    a, b = found.arms
    assert (a.answers, b.errors) == (12, 12)
    assert b.cost_usd and a.cost_usd and b.cost_usd > a.cost_usd, "gpt-4o was paid for its wrong answers"
    assert b.prompt_tokens > 0
    (reason,) = b.reasons
    assert "the answer does not match the schema" in reason
    stopped = evals.compare([path], arms, schema=schema, expect="n", spend_limit=b.cost_usd / 3, concurrency=1)
    assert "the spend limit" in stopped.stopped


@pytest.mark.parametrize(
    ("expect", "schema", "problem"),
    [
        ("categroy", None, "The inputs have no field 'categroy', which `expect` names."),
        ("category", {"cause": {"type": "string"}}, "The schema has no field 'category', which `expect` names."),
    ],
)
def test_a_misspelt_field_is_found_before_anything_is_sent(
    net: Loopback, waterfall: Write, tmp_path: Path, expect: str, schema: Json | None, problem: str
) -> None:
    servers = arms(net, waterfall, a="x", b="x")
    path = lines(tmp_path, [{"input": "q", "category": "x"}])
    wanted = schema and {"type": "object", "properties": schema}
    with pytest.raises(UsageError, match=re.escape(problem)):
        evals.compare([path], ["model-a", "model-b"], expect=expect, schema=wanted)
    assert not any(each.completions for each in servers.values())


def test_an_option_takes_precedence_over_how_a_folder_scores(
    net: Loopback, waterfall: Write, tmp_path: Path, biollm: Any
) -> None:
    judge = {"role": "assistant", "content": '{"winner": "tie", "reason": "?"}'}
    servers = arms(net, waterfall, a="yes", b="no", j=lambda _: judge)
    (folder := tmp_path / "in").mkdir()
    (folder / "compare.yaml").write_text("expect: right")
    lines(folder, [{"input": "q", "right": "no"}, {"input": "p", "right": "no"}])
    given = ("compare", "--a", "model-a", "--b", "model-b", folder, "-o", tmp_path / "out.jsonl", "--json")
    for words, scores in (
        ((), [0, 1]),
        (("--command", "diff -q {answer} {expected}"), [0, 1]),
        (("--judge", "model-j"), [None, None]),
    ):
        assert [each["score"] for each in biollm(*given, *words).json["arms"]] == scores
    assert len(servers["j"].completions) == 4
    assert "exclude each other" in biollm(*given, "--judge", "model-j", "--expect", "right").err


def test_a_file_that_is_named_twice_counts_once(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    arms(net, waterfall, a="x", b="x")
    path = lines(tmp_path, [{"input": "q"}])
    again = tmp_path / ".." / tmp_path.name / path.name
    assert evals.compare([path, tmp_path, again], ["model-a", "model-b"]).inputs == 1


# --- what it says --------------------------------------------------------------------------------------------------


def test_no_difference_is_not_a_claim_of_equality(net: Loopback, waterfall: Write) -> None:
    arms(net, waterfall, a=knows(), b=knows(*list(EXPECTED)[:23]))
    sentence = pair(evals.compare([DIAGNOSIS], ["model-a", "model-b"])).sentence
    assert sentence.startswith(
        "no difference shown: 1 of 24 inputs differs (p = 1); model-a's lead +0.0 to +12.5 points (95% interval); about "
    )
    assert sentence.endswith("inputs are needed to see 5 points")


def test_inputs_about_one_file_are_no_evidence(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    arms(net, waterfall, a="yes", b="no")
    records = [{"input": f"question {n}", "target": "yes", "cluster": "a.log"} for n in range(8)]
    found = pair(evals.compare([lines(tmp_path, records)], ["model-a", "model-b"]))
    assert found.sentence == "8 of 8 inputs differ; inputs about one file say nothing about others"
    assert (found.p, found.low, found.high, found.one_wins) == (None, None, None, 8)


def test_results_are_a_dataset_of_inspect(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    arms(net, waterfall, a=knows(), b=knows())
    evals.compare([DIAGNOSIS], ["model-a", "model-b"], results=tmp_path / "out.jsonl", limit=2)
    found = map(json.loads, (tmp_path / "out.jsonl").open())
    first = next(each for each in found if each["id"] == "nextflow_oom.log")
    assert first["target"] == "memory"
    assert "exit status (137)" in first["input"][0]["content"]
    assert (tmp_path / "out.jsonl").stat().st_mode & 0o777 == 0o600


def test_the_page_shows_the_answers_side_by_side(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    arms(net, waterfall, a="<script>alert(1)</script>", b="no")
    page = evals.compare([lines(tmp_path, [{"input": "q", "target": "no"}])], ["model-a", "model-b"]).html()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert "Different answers, open below: 1 of 1." in page
    assert "http" not in page.replace("http-equiv", ""), "nothing is fetched"


def test_the_command_line_compares(
    net: Loopback, waterfall: Write, biollm: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    arms(net, waterfall, a=knows(*list(EXPECTED)[:12]), b=knows())
    ran = biollm("compare", "--a", "model-a", "--b", "model-b", DIAGNOSIS, "--html", "out.html")
    assert ran.code == 0, ran.err
    head, _, b, *_ = ran.out.splitlines()
    assert head.split() == ["arm", "score", "answers", "errors", "p50", "p95", "tokens", "in", "out", "USD"]
    assert b.split()[:4] == ["model-b", "100%", "24", "0"]
    assert "model-b is better" in ran.out
    assert "model-a" in (tmp_path / "out.html").read_text()
    assert (tmp_path / "out.html").stat().st_mode & 0o777 == 0o600
    found = biollm("compare", "--a", "model-a", "--b", "model-b", DIAGNOSIS, "--json").json
    assert found["pairs"][0]["other_wins"] == pytest.approx(
        24 * (found["arms"][1]["score"] - found["arms"][0]["score"])
    )
    assert biollm("compare", "--a", "model-a", "--b", "model-b", "gone.log").code == 2


def test_an_arm_without_an_answer_is_named_with_its_reason(
    net: Loopback, waterfall: Write, biollm: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    ok, down = net.serve(text="yes"), net.serve(then=HTTP_400)
    waterfall(a={"base_url": down.url, "models": ["a"]}, b={"base_url": ok.url, "models": ["b"]})
    path = lines(tmp_path, [{"input": "Is it?"}, {"input": "Was it?"}])
    ran = biollm("compare", "--a", "a", "--b", "b", path)
    assert ran.code == 69
    assert re.search("^a: 2 without an answer: .*HTTP 400", ran.out, re.MULTILINE)
    assert "No answer is scored: the inputs have no right answers" in ran.out


def test_why_nothing_is_compared(net: Loopback, waterfall: Write, tmp_path: Path, paid: Any) -> None:
    a, b, down = net.serve(text="x"), net.serve(text="y"), net.serve(then=HTTP_400)
    garbled = net.serve(text="no JSON")
    waterfall(
        a=paid(a, "a"),
        b=paid(b, "b", "gpt-4o"),
        **{n: {"base_url": s.url, "models": [n]} for n, s in {"d": down, "g": garbled}.items()},
    )
    path = lines(tmp_path, [{"input": "q", "target": "x"}])
    models = ["a/gpt-4o-mini", "b/gpt-4o"]
    for names, settings, sentence in (
        (["a/gpt-4o-mini", "d"], {}, "a/gpt-4o-mini and d: no input has an answer of both."),
        (["a/gpt-4o-mini", "d"], {"judge": "g"}, "a/gpt-4o-mini and d: no input has an answer of both."),
        (models, {"judge": "g"}, "g: 1 without a verdict: "),
        (
            models,
            {"judge": "a/gpt-4o-mini", "spend_limit": 1e-9, "concurrency": 1},
            ", before any answers were compared.",
        ),
    ):
        said = "\n".join(report_lines(evals.compare([path], names, wait=0, **settings)))
        assert sentence in said
        assert "No answer is scored" not in said


def test_small_numbers_are_written_out(net: Loopback, waterfall: Write, tmp_path: Path, paid: Any) -> None:
    server = net.serve(text="x")
    waterfall(a=paid(server, "a"), b=paid(server, "b", "gpt-4o"))
    found = evals.compare([lines(tmp_path, [{"input": "q"}])], ["a/gpt-4o-mini", "b/gpt-4o"])
    assert pair(found).sentence == "0 of 1 answer differs"
    assert all(float(row[-1]) > 0 for row in rows(found))


@pytest.mark.slow
def test_a_page_never_replaces_an_input(net: Loopback, waterfall: Write, tmp_path: Path, biollm: Any) -> None:
    arms(net, waterfall, a="x", b="x")
    content = (path := lines(tmp_path, [{"input": "q"}])).read_text()
    (notes := tmp_path / "notes.txt").write_text("<!doctype html> mine")
    for inputs_, html, problem in (
        (path, path, "is among the inputs"),
        (tmp_path, tmp_path / "page.html", "is among the inputs"),
        (path, tmp_path, "is not a file in a folder that exists"),
        (path, tmp_path / "none" / "page.html", "is not a file in a folder that exists"),
        (path, notes, "exists, and is no page of `biollm compare`"),
    ):
        ran = biollm("compare", "--a", "model-a", "--b", "model-b", inputs_, "--html", html)
        assert (ran.code, problem in ran.err) == (2, True)
    assert (path.read_text(), notes.read_text()) == (content, "<!doctype html> mine")
    for _ in range(2):
        page = ("--html", tmp_path / "page.html")
        assert biollm("compare", "--a", "model-a", "--b", "model-b", path, *page, "-o", tmp_path / "r.jsonl").code == 0


@pytest.mark.parametrize(
    "words",
    [
        "compare x.log --a a --b b --command",
        "compare x.log --a a --b b --judge",
        "compare x.log --a a --b b --expect",
        "compare x.log --a a --b b --c",
        "complete hi --redact-name",
        "complete hi --cache-similar --cache-name",
        "tune export -o x.jsonl --name",
    ],
)
def test_an_option_without_a_value_is_named(biollm: Any, words: str) -> None:
    ran = biollm(*words.split(), "")
    assert (ran.code, f"{words.split()[-1]} is empty." in ran.err) == (2, True)


def test_an_interrupt_says_how_to_go_on(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    import signal

    server = net.serve(text="x")
    hanging = net.serve(then=HANG)
    waterfall(a={"base_url": server.url, "models": ["a"]}, b={"base_url": hanging.url, "models": ["b"]})
    command = [
        sys.executable,
        "-c",
        "from biollm.cli import main; main()",
        "compare",
        "--a",
        "a",
        "--b",
        "b",
        str(lines(tmp_path, [{"input": "q"}])),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if hanging.completions and (tmp_path / "biollm-compare.jsonl").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "run the same command to go on" in err
