"""Rated answers become training data without names and keys, and an adapter's entry of models.yaml."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ran
from provider import Loopback

from biollm.client import get_model_client
from biollm.config import Cluster, Model
from biollm.errors import UsageError
from biollm.evals import tuning
from biollm.evals.tuning import Example

Biollm = Callable[..., Ran]
KEY = "planted-key-of-an-account-0123"
MINE = Model(key="mine", hf_id="lab/Mine-7B", path=Path("/weights/weights-of-mine"))


def chat(question: str, answer: str = "out of memory", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def jsonl(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def examples(*questions: str, run: str = "") -> list[Example]:
    return [Example(chat(question)["messages"], run) for question in questions]


@pytest.mark.parametrize(
    ("planted", "left"),
    [
        ("token=ghp_0123456789abcdefghijklmnopqrstuvwxyz1", "token=<key-1>"),
        ("login -p with planted-key-of-an-account-0123", "login -p with <key-1>"),
        ("user: annabel failed", "user: <user-1> failed"),
        ("annabel@lab.example wrote", "<email-1> wrote"),
        ("open /home/annabel/projects/kx/reads.bam", "open <path>/reads.bam"),
        ("open /scratch/group7/kx-secret/run_4/reads.bam: denied", "open <path>/reads.bam: denied"),
        ("see /usr/bin/samtools", "see /usr/bin/samtools"),
        ("https://site.example/a/b/c", "https://site.example/a/b/c"),
        ("tumor_7 is empty", "<name-1> is empty"),
    ],
)
def test_secrets_users_paths_and_names_are_replaced(planted: str, left: str) -> None:
    wrong = Example(chat(planted, answer=f"Because of {planted}")["messages"])
    (found,) = tuning.prepared([wrong], names=["tumor_7"], secrets=[KEY])
    assert [message["content"] for message in found.messages] == [left, f"Because of {left}"]


def test_of_the_same_failure_in_two_runs_the_last_rating_is_kept() -> None:
    first = Example(chat("slurm job 123 of tumor_7: oom-kill", "disk full")["messages"])
    last = Example(chat("slurm job 456 of blood_3: oom-kill", "out of memory")["messages"])
    other = Example(chat("slurm job 123 of tumor_7: time limit", "walltime")["messages"])
    found = tuning.prepared([first, last, other], names=["tumor_7", "blood_3"])
    assert [each.messages[-1]["content"] for each in found] == ["out of memory", "walltime"]


def test_a_run_stays_on_its_side_when_others_are_added() -> None:
    many = [each for run in range(100) for each in examples(f"a {run}", f"b {run}", run=f"run-{run}")]
    train, held_out = tuning.split(many)
    assert len(train) + len(held_out) == 200
    assert not {each.run for each in train} & {each.run for each in held_out}
    assert 10 <= len({each.run for each in held_out}) <= 32
    fewer, held_out_of_fewer = tuning.split(many[:100])
    assert all(each in train for each in fewer)
    assert all(each in held_out for each in held_out_of_fewer)


def test_few_runs_hold_one_out() -> None:
    train, held_out = tuning.split(tuning.prepared(examples("one", "two")))
    assert (len(train), len(held_out)) == (1, 1)
    assert tuning.split([]) == ([], [])


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "no JSON",
        "",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"messages": [1, 2]}',
        '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "x"}]}',
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: str) -> None:
    file = jsonl(tmp_path / "own.jsonl", chat("x"))
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UsageError, match=r"own\.jsonl:2 must be a conversation that ends with an answer"):
        list(tuning.read(file))


def test_rated_answers_are_exported(
    net: Loopback, waterfall: Callable[..., Path], biollm: Biollm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall({"store_rated": "7d"}, first=net.serve(text="out of memory"))
    monkeypatch.setenv("FIRST_KEY", KEY)
    client = get_model_client(sender="direct")
    for question, rating, correction in (
        (f"exit 137 with {KEY}", "up", None),
        ("exit 140", "down", "walltime"),
        ("exit 1", "down", None),
        ("exit 2", None, None),
    ):
        answer = client.complete(question)
        if rating:
            client.rate(answer, rating, correction=correction)
    ran = biollm("tune", "export", "-o", tmp_path / "train.jsonl")
    held_out = tmp_path / "train.held-out.jsonl"
    assert ran.code == 0
    assert ran.out == f"{tmp_path / 'train.jsonl'}: 1 example\n{held_out}: 1 example, held out\n"
    (trained,), (expected,) = read(tmp_path / "train.jsonl"), read(held_out)
    assert [message["role"] for message in trained["messages"]] == ["user", "assistant"]
    assert [message["role"] for message in expected["messages"]] == ["user"]
    pairs = {trained["messages"][0]["content"]: trained["messages"][-1]["content"]}
    pairs[expected["messages"][0]["content"]] = expected["expected"]
    assert pairs == {"exit 137 with <key-1>": "out of memory", "exit 140": "walltime"}
    assert stat.S_IMODE(held_out.stat().st_mode) == 0o600


def test_a_file_of_ones_own_is_exported_and_too_few_examples_are_refused(biollm: Biollm, tmp_path: Path) -> None:
    own = jsonl(tmp_path / "own.jsonl", chat("a", run="1"), chat("b", run="1"), chat("c", run="2"))
    ran = biollm("tune", "export", "--from", own, "-o", tmp_path / "out.jsonl")
    assert ran.code == 0
    assert {len(read(tmp_path / "out.jsonl")), len(read(tmp_path / "out.held-out.jsonl"))} == {1, 2}
    (tmp_path / "out.jsonl").unlink()
    for out, problem in (
        ("out.jsonl", "out.held-out.jsonl exists."),
        ("own.jsonl", "would be replaced by what is made of it"),
        ("none/out.jsonl", f"there is no folder {tmp_path / 'none'}."),
    ):
        ran = biollm("tune", "export", "--from", own, "-o", tmp_path / out)
        assert (ran.code, problem in ran.err) == (2, True)
    assert not (tmp_path / "none").exists()
    assert biollm("tune", "export", "--from", own, "-o", tmp_path / "out.jsonl", "--force").code == 0
    one = jsonl(tmp_path / "one.jsonl", chat("a", run="1"), chat("b", run="1"))
    ran = biollm("tune", "export", "--from", one, "-o", tmp_path / "none.jsonl")
    assert ran.code == 2
    assert "Found 2 different examples, of fewer than two runs." in ran.err
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("out", ["own.jsonl", "own", ".", "link.jsonl"])
def test_what_is_read_is_not_replaced(biollm: Biollm, tmp_path: Path, out: str) -> None:
    own = jsonl(tmp_path / "own.jsonl", chat("a", run="1"), chat("b", run="2"))
    own = own.rename(tmp_path / "own.held-out.jsonl") if out == "own" else own
    (tmp_path / "link.jsonl").symlink_to(own)
    content = own.read_text()
    assert biollm("tune", "export", "--from", own, "-o", tmp_path / out).code == 2
    assert own.read_text() == content


@pytest.mark.parametrize(("rank", "more"), [(16, {}), (32, {"lora_rank": 32})])
def test_the_entry_of_an_adapter(tmp_path: Path, rank: int, more: dict[str, int]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    text = tuning.entry("tuned", MINE, Cluster(), tmp_path)
    assert yaml.safe_load(text) == {"models": {"tuned": {"base": "mine", "lora": str(tmp_path), **more}}}


@pytest.mark.parametrize(
    ("base", "accepted"),
    [(None, True), ("lab/Mine-7B", True), ("/old/place/weights-of-mine", True), ("lab/Other-7B", False)],
)
def test_an_adapter_of_another_base_has_no_entry(tmp_path: Path, base: str | None, accepted: bool) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "base_model_name_or_path": base}))
    if accepted:
        assert tuning.entry("tuned", MINE, Cluster(), tmp_path)
    else:
        with pytest.raises(UsageError, match=r"is of lab/Other-7B, not of mine\."):
            tuning.entry("tuned", MINE, Cluster(), tmp_path)


def test_without_an_adapter_there_is_no_entry(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no adapter in"):
        tuning.entry("tuned", MINE, Cluster(), tmp_path)
