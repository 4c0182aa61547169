"""The command line: what goes to which stream, exit codes, stdin, JSON, help, and no secrets anywhere."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from behaviours import HANG, HTTP_400, HTTP_401, HTTP_401_ECHO, HTTP_500, Behaviour, limited
from conftest import Ran, full_disk
from provider import Loopback, Server

from biollm.cli.app import app
from biollm.client import get_model_client
from biollm.ledger import Ledger

Biollm = Callable[..., Ran]
Waterfall = Callable[..., Path]
PROGRAM = Path(sys.executable).with_name("biollm")


def asked(server: Server) -> str:
    """Return the last prompt that a server got."""
    return server.completions[-1].body["messages"][-1]["content"]


# --- Answers -----------------------------------------------------------------------------------------------------


def test_the_answer_alone_is_on_stdout(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.refusing(), second=net.serve(text="Out of memory."))
    ran = biollm("complete", "why?")
    assert (ran.code, ran.out) == (0, "Out of memory.\n")
    said = ran.err.splitlines()
    assert said[:3] == ["· looking for a provider", "· asking first/small", "· asking second/small"]
    assert re.match(r"— first/small \d\.\d s without an answer, then second/small \d\.\d s, ", said[3])


def test_quiet_says_nothing_on_stderr(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.serve())
    assert biollm("complete", "why?", "-q") == Ran(0, "All is well.\n", "")


def test_verbose_names_every_attempt(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(
        keyless={"base_url": net.refusing(), "env_key": "NOT_SET"}, broken=net.serve(then=HTTP_500), third=net.serve()
    )
    ran = biollm("complete", "why?", "-v")
    skipped, failed, again, ok = (
        re.sub(r"\d+\.\d s\b ?", "", line).split(maxsplit=2) for line in ran.err.splitlines()[-6:-2]
    )
    assert re.fullmatch(r"  id [0-9a-f]{32}", ran.err.splitlines()[-2])
    assert skipped == ["skipped", "keyless/small", "no key: set NOT_SET"]
    assert failed == again == ["failed", "broken/small", "HTTP 500: Internal server error."]
    assert ok == ["ok", "third/small"]


def test_streaming_into_a_pipe_gives_the_same_text(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    server = net.serve(text="word by word")
    waterfall(first=server)
    assert biollm("complete", "why?", "--stream").out == "word by word\n"
    assert server.completions[-1].body["stream"] is True
    assert biollm("complete", "why?").out == "word by word\n"
    assert not server.completions[-1].body.get("stream")


def test_a_stream_that_breaks_starts_again(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.serve(then=Behaviour(cut=3), text="half of it is lost"), second=net.serve(text="whole"))
    ran = biollm("complete", "why?", "--stream")
    assert ran.out.endswith("\n\nwhole\n")
    assert "first/small broke off (the stream ended before it was complete)" in ran.err


def test_options_reach_the_provider(net: Loopback, waterfall: Waterfall, biollm: Biollm, state: Path) -> None:
    server = net.serve()
    waterfall(first=server)
    options = [
        "--system",
        "Be brief.",
        "--max-tokens",
        "9",
        "--temperature",
        "0.5",
        "--tag",
        "agent=me",
        "--tag",
        "a=b=c",
    ]
    assert biollm("complete", "why?", *options).code == 0
    body = server.completions[-1].body
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    assert (body["max_tokens"], body["temperature"]) == (9, 0.5)
    assert [record.tags for record in _records(state)] == [{"agent": "me", "a": "b=c"}]


def test_a_provider_or_model_can_be_forced(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(
        first=net.serve(text="1"),
        second=net.serve(text="2"),
        third={"base_url": net.serve(text="3").url, "models": ["big"]},
    )
    assert biollm("complete", "why?", "--provider", "second").out == "2\n"
    assert biollm("complete", "why?", "--model", "big").out == "3\n"


def test_no_fallback_asks_only_the_first(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    first, second = net.serve(then=HTTP_500), net.serve()
    waterfall(first=first, second=second)
    assert biollm("complete", "why?", "--no-fallback").code == 69
    assert second.requests == []


@pytest.mark.slow
def test_max_retries_waits_for_what_frees_soonest(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.serve(limited("0.2"), text="freed"))
    assert biollm("complete", "why?", "--max-retries", "1").out == "freed\n"


def test_local_only_keeps_off_the_cloud(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(cloud="https://cloud.invalid/v1", near=net.serve(text="near"))
    ran = biollm("complete", "why?", "--local-only")
    assert ran.out == "near\n"
    assert "cloud" not in ran.err


def test_a_schema_gives_json(net: Loopback, waterfall: Waterfall, biollm: Biollm, tmp_path: Path) -> None:
    shape = {"type": "object", "properties": {"cause": {"type": "string"}}, "required": ["cause"]}
    file = tmp_path / "cause.json"
    file.write_text(json.dumps(shape))
    waterfall(first={"base_url": net.serve().url, "json_schema": True})
    assert biollm("complete", "why?", "--schema", file).json == {"cause": "text"}


def test_json_holds_the_whole_story(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.refusing(), second=net.serve())
    fact = biollm("complete", "why?", "--json").json
    attempts, ms = fact.pop("attempts"), fact.pop("latency_ms")
    assert [(each["deployment"], each["outcome"]) for each in attempts] == [
        ("first/small", "failed"),
        ("second/small", "ok"),
    ]
    assert set(attempts[0]) == {"deployment", "outcome", "reason", "status", "ms"}
    assert ms > 0
    assert re.fullmatch("[0-9a-f]{32}", fact.pop("id"))
    assert fact == {
        "text": "All is well.",
        "provider": "second",
        "account": "default",
        "model": "small",
        "deployment": "second/small",
        "usage": {"prompt_tokens": 1, "completion_tokens": 3, "cached_tokens": 0, "cache_write_tokens": 0,
                  "reasoning_tokens": 0, "estimated": False},
        "cost_usd": None,
        "degraded": False,
        "cached": False,
        "reasoning": "",
        "notes": [],
        "parsed": None,
        "tool_calls": [],
        "finish_reason": "stop",
    }  # fmt: skip


def test_json_holds_a_failure_too(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.serve(then=limited("30")))
    biollm("complete", "why?")
    ran = biollm("complete", "why?", "--json", "-q")
    assert (ran.code, ran.json["exit_code"]) == (75, 75)
    assert ran.json["error"] == "All deployments are at a limit or cooling down."
    assert 20 < ran.json["retry_after"] <= 30
    assert [each["deployment"] for each in ran.json["attempts"]] == ["first/small"]
    assert ran.err.endswith(f"{ran.json['hint']}\n")


# --- Input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put a pipe with a text in it, closed at its end, in the place of stdin."""
    kept = os.dup(0)

    def feed(text: str) -> None:
        reader, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        os.dup2(reader, 0)
        os.close(reader)
        monkeypatch.setattr(sys, "stdin", open(0, closefd=False))  # noqa: SIM115

    yield feed
    os.dup2(kept, 0)
    os.close(kept)


INPUTS = [
    (["why?"], None, "why?"),
    (["why?"], "log\n", "log\n\n\nwhy?"),
    ([], "log\n", "log\n"),
    (["-"], "log", "log"),
    (["why?", "-f", "-"], "log", "log\n\nwhy?"),
    (["why?", "-f", "a.log"], None, "--- a.log ---\nfirst\n\nwhy?"),
    (["why?", "-f", "a.log", "-f", "b.log"], None, "--- a.log ---\nfirst\n\n--- b.log ---\nsecond\n\nwhy?"),
    (["-f", "a.log"], "piped", "--- a.log ---\nfirst\n\npiped"),
    (["why?"], "  \n", "why?"),
]


@pytest.mark.parametrize(("argv", "stdin", "prompt"), INPUTS)
def test_files_and_stdin_come_before_the_question(
    argv: list[str], stdin: str | None, prompt: str, net: Loopback, waterfall: Waterfall, biollm: Biollm,
    piped: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server = net.serve()
    waterfall(first=server)
    (tmp_path / "a.log").write_text("first")
    (tmp_path / "b.log").write_text("second")
    monkeypatch.chdir(tmp_path)
    if stdin is not None:
        piped(stdin)
    assert biollm("complete", *argv).code == 0
    assert asked(server) == prompt


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "stdin", "argument", "system", "tag"])
def test_what_is_not_utf8_is_read_all_the_same_and_in_one_way(
    place: str, net: Loopback, waterfall: Waterfall, tmp_path: Path
) -> None:
    server = net.serve()
    waterfall(first=server)
    odd = b"caf\xe9 \xe2\x82!"  # Latin-1, and half a character
    (tmp_path / "odd.log").write_bytes(odd)
    options: dict[str, list[str | bytes]] = {
        "file": ["-f", str(tmp_path / "odd.log")], "argument": [odd], "system": ["--system", odd],
        "tag": ["--tag", b"agent=" + odd],
    }  # fmt: skip
    command = [PROGRAM, "complete", *options.get(place, []), *(["why?"] * (place != "argument"))]
    run = subprocess.run(command, input=odd if place == "stdin" else b"", capture_output=True, check=False)
    assert (run.returncode, run.stdout) == (0, b"All is well.\n"), run.stderr.decode()
    assert (b"was read as Latin-1" in run.stderr) == (place in ("file", "stdin"))
    if place != "tag":
        latin1 = place in ("file", "stdin")
        assert ("café â\ufffd!" if latin1 else "caf\ufffd \ufffd\ufffd!") in json.dumps(
            server.completions[0].body["messages"], ensure_ascii=False
        )


# --- Exit codes --------------------------------------------------------------------------------------------------

FAILURES: list[tuple[str, list[Behaviour], list[str], int, str]] = [
    ("a server error", [HTTP_500], [], 69, "All deployments failed."),
    (
        "every provider rejects the request",
        [HTTP_400, HTTP_400],
        [],
        69,
        "The request was rejected.",
    ),
    ("the deadline", [HANG], ["--deadline", "0.3"], 69, "No answer within the deadline of 0.3 s."),
    ("a rate limit", [limited("30")], [], 75, "All deployments are at a limit or cooling down."),
    ("a refused key", [HTTP_401], [], 77, "No provider has a working key."),
]


@pytest.mark.parametrize(
    ("how", "options", "code", "sentence"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES]
)
def test_the_exit_code_says_what_failed(
    how: list[Behaviour],
    options: list[str],
    code: int,
    sentence: str,
    net: Loopback,
    waterfall: Waterfall,
    biollm: Biollm,
) -> None:
    waterfall(**{f"p{at}": net.serve(then=each) for at, each in enumerate(how)})
    if code == 75:
        biollm("complete", "why?")  # which learns of the limit
    ran = biollm("complete", "why?", *options)
    assert (ran.code, ran.out) == (code, "")
    assert f"biollm: {sentence}\n" in ran.err
    assert "Traceback" not in ran.err


def test_missing_keys_are_named_once_per_account(waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(
        one={"base_url": "https://one.invalid/v1", "env_key": "ONE", "models": ["a", "b"]},
        two={"base_url": "https://two.invalid", "env_key": "TWO"},
    )
    ran = biollm("complete", "why?", "-q")
    assert (ran.code, ran.out) == (77, "")
    assert ran.err.splitlines() == [
        "biollm: No provider has a key.",
        "  one (2 models): no key: set ONE",
        "  two/small: no key: set TWO",
        "Set one of these keys; `biollm providers` then shows that it is found.",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", " is not JSON: "),
        ("[]", " is not a JSON Schema: it must be an object."),
        ('{"type": "objekt"}', " is no JSON Schema: 'objekt' is not valid"),
    ],
)
def test_a_wrong_schema_is_named_with_its_file(
    text: str, why: str, net: Loopback, waterfall: Waterfall, biollm: Biollm, tmp_path: Path
) -> None:
    waterfall(first=net.serve())
    (file := tmp_path / "schema.json").write_text(text)
    ran = biollm("complete", "why?", "--schema", file)
    assert (ran.code, f"{file}{why}" in ran.err) == (2, True), ran.err


USAGE = [
    (["complet"], "Did you mean 'complete'"),
    (["complete", "--provder", "x"], "--provider"),
    (["complete", "why?", "--provider", "frist"], "Did you mean 'first'? Known: first."),
    (["complete", "why?", "--model", "smal"], "Did you mean 'small'?"),
    (["complete", "why?", "--temperature", "hot"], "'hot' is not a valid float.\nIt must be a number."),
    (["complete"], "The prompt is empty."),
    (["complete", "   "], "The prompt is empty."),
    (["complete", "why?", "-f", "missing.log"], "missing.log: No such file or directory."),
    (["complete", "why?", "-f", "/"], "/: Is a directory."),
    (["complete", "why?", "--tag", "agent"], "--tag 'agent' is not key=value."),
    (["complete", "why?", "--timeout", "-1"], "timeout is -1; it must be a finite number of seconds above 0."),
    (["complete", "why?", "--deadline", "soon"], "--deadline"),
    (["complete", "why?", "--temperature", "9"], "--temperature"),
    (["complete", "why?", "--schema", "/dev/null"], "/dev/null is not JSON"),
    (["explain", "--provider", "frist"], "Did you mean 'first'?"),
    (["config", "--schema", "model"], "--schema"),
    (["complete", "hello", "world"], "Put quotes around a text of several words."),
    (["complete", "--outFilterMismatchNmax what is it?"], "Put -- before a text that begins with a dash"),
    (["complete", "why?", "--max-tokens", "many"], "It must be a whole number."),
    (["complete", "why?", "--deadline", "soon"], "It must be a number."),
    (["serve", "--host", "0.0.0.0"], "--host needs --port."),
    (["serve", "--drain", "nan"], "--drain is nan; it must be a finite number of seconds."),
    (["complete", "why?", "--deadline", "nan"], "--deadline is nan; it must be a finite number of seconds."),
    (["complete", "why?", "--temperature", "nan"], "--temperature is nan; it must be a finite number.\n"),
    (["tune", "render", "qwen-coder-32b", "/dev/null", "--epochs", "inf"], "--epochs is inf; it must be a finite"),
    (["serve", "--idle-timeout", "inf"], "--idle-timeout is inf; it must be a finite number"),
    (["login", "first"], "first needs no login.\nIt takes a key: set FIRST_KEY."),
    (["login", "frist"], "There is no provider named 'frist'.\nDid you mean 'first'?"),
    (["top", "--html", "/nowhere/now.html"], "/nowhere/now.html cannot be written: there is no folder /nowhere."),
    (["render-slurm", "qwen-coder-32b", "--force", "-o", "/nowhere/a.sh"], "there is no folder /nowhere."),
    (["login", "github_copilot"], "There is no provider named 'github_copilot'."),
    (["embedded", "pull", "nosuch"], "Known: smollm2-135m."),
    (["health", "--timeout", "0"], "--timeout"),
    (["down"], "Name a model or a job, or use --all."),
    (["up", "qwen-coder-32"], "Did you mean 'qwen-coder-32b'?"),
]


@pytest.mark.parametrize(("argv", "sentence"), USAGE, ids=[" ".join(row[0]) for row in USAGE])
def test_a_mistake_is_named_with_its_mend(
    argv: list[str], sentence: str, net: Loopback, waterfall: Waterfall, biollm: Biollm
) -> None:
    server = net.serve()
    waterfall(first=server)
    ran = biollm(*argv)
    assert (ran.code, ran.out, server.requests) == (2, "", [])
    assert sentence in ran.err
    assert "Traceback" not in ran.err


def test_the_check_names_missing_key_files_and_shipped_entries(
    tmp_path: Path, waterfall: Waterfall, biollm: Biollm
) -> None:
    waterfall({"inherit": True}, lab={"base_url": "https://lab.example/v1", "key_file": f"{tmp_path}/key"})
    ran = biollm("config", "--check")
    assert ran.code == 0 and ran.out.startswith("Configuration OK")
    assert f"providers.lab.key_file: the key file {tmp_path}/key cannot be read: No such file or directory." in ran.err
    assert "warning: shipped providers.yaml:" in ran.err
    assert "To change a shipped entry, write the keys that differ into a file in " in ran.err


def test_a_wrong_configuration_is_one_screen(waterfall: Waterfall, biollm: Biollm) -> None:
    folder = waterfall()
    (folder / "providers.yaml").write_text("providers:\n  openai: {priorty: 1}\n")
    for argv in (
        ["complete", "why?"],
        ["config"],
        ["config", "--check"],
        ["explain"],
        ["models"],
        ["providers"],
        ["health"],
    ):
        ran = biollm(*argv)
        assert (ran.code, ran.out) == (78, ""), argv
        assert (
            f"{folder}/providers.yaml:2: providers.openai.priorty: is not a known key. Did you mean priority?"
            in ran.err
        )
        assert "Traceback" not in ran.err


def test_without_a_command_the_help_is_shown(biollm: Biollm) -> None:
    ran = biollm()
    assert ran.code == 2
    assert "Commands:" in ran.out + ran.err


# --- Facts -------------------------------------------------------------------------------------------------------


def test_explain_says_who_would_answer_and_sends_nothing(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    server = net.serve()
    waterfall(
        first={"base_url": "https://a.invalid", "env_key": "NOT_SET"}, second={"base_url": server.url, "tools": False}
    )
    ran = biollm("explain")
    assert ran.out.splitlines() == [
        "   #  deployment    status   reason",
        "   1  first/small   keyless  no key: set NOT_SET",
        "→  2  second/small  ready",
        "",
        "second/small would answer.",
    ]
    fact = biollm("explain", "--tools", "--json").json
    assert [each["standing"] for each in fact] == ["keyless", "unfit"]
    names = {"deployment", "order", "provider", "account", "model", "standing", "reason", "until", "cost", "load"}
    assert set(fact[0]) == names
    ran = biollm("explain", "--tools")
    assert (ran.code, ran.out.endswith("\nNo deployment is available.\n")) == (69, True)
    assert biollm("explain", "--tools", "--json").code == 69
    assert server.requests == []


def test_explain_says_when_a_limit_ends(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.serve(then=limited("300")))
    biollm("complete", "why?")
    assert " s left)" in biollm("explain").out
    (fact,) = biollm("explain", "--json").json
    assert fact["standing"] == "limited"
    assert fact["until"].endswith("+00:00")


def test_providers_shows_what_is_used(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    server = net.serve()
    waterfall(first={"base_url": server.url, "rate_limit": "15/min", "token_budget": "30M/month"})
    biollm("complete", "why?")
    assert "1 of 15/min, 4 of 30M tokens/month" in biollm("providers").out
    (fact,) = biollm("providers", "--json").json
    minute, month = fact.pop("limits")
    assert minute == {
        "limit": "15/min",
        "kind": "requests",
        "amount": 15,
        "per": "min",
        "used": 1,
        "resets": minute["resets"],
    }
    assert (month["used"], month["resets"][-15:]) == (4, "T00:00:00+00:00")
    assert set(fact) == {"priority", "provider", "account", "type", "standing", "free", "reason"}


def test_models_lists_the_waterfall(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first={"base_url": net.refusing(), "models": ["gpt-5.4-mini", "unheard-of"]})
    table = biollm("models").out.splitlines()
    assert [line.split()[:3] for line in table[1:3]] == [["1", "gpt-5.4-mini", "first"], ["2", "unheard-of", "first"]]
    fact = biollm("models", "--json").json[1]
    assert (fact["model"], fact["context_length"], fact["capabilities"]) == ("unheard-of", None, None)


def test_health_exits_69_when_nobody_is_there(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    up = net.serve()
    waterfall(first=up, second=net.refusing())
    ran = biollm("health")
    assert (ran.code, [line.split()[:2] for line in ran.out.splitlines()[1:]]) == (
        0,
        [["first", "up"], ["second", "down"]],
    )
    assert [request.path for request in up.requests] == ["/v1/models"]
    facts = biollm("health", "--json").json
    assert set(facts[0]) == {"provider", "who", "available", "latency_ms", "error", "keyless", "missing", "resting"}
    waterfall(second=net.refusing())
    assert biollm("health").code == 69


def test_config_tells_where_a_value_came_from(waterfall: Waterfall, biollm: Biollm) -> None:
    folder = waterfall(first="https://a.invalid/v1")
    row = next(line for line in biollm("config").out.splitlines() if line.startswith("providers.first.base_url "))
    assert row.split() == [
        "providers.first.base_url",
        "https://a.invalid/v1",
        f"{folder}/providers.yaml:{_line(folder, 'base_url')}",
    ]
    facts = biollm("config", "--json").json
    assert facts["sources"]["providers.first.base_url"] == row.split()[2]
    assert "providers" in facts["values"]


def _line(folder: Path, word: str) -> int:
    lines = (folder / "providers.yaml").read_text().splitlines()
    return next(at for at, line in enumerate(lines, 1) if word in line)


def test_config_check_says_yes_or_78(waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first="https://a.invalid/v1")
    ran = biollm("config", "--check")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Configuration OK: 1 provider,")


def test_config_check_names_a_provider_that_would_be_the_gateway(
    waterfall: Waterfall, biollm: Biollm, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = waterfall(first="https://a.invalid/v1")
    monkeypatch.setenv("FIRST_KEY", "biollm-agent.codex.any.1.0")
    assert biollm("config", "--check").err == (
        f"warning: {folder}/providers.yaml:{_line(folder, 'env_key')}: providers.first.env_key: FIRST_KEY holds a key of "
        "biollm's own gateway, which cannot be its own provider. Set the provider's own key.\n"
    )


def test_config_for_the_proxy_names_keys_and_holds_none(waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first="https://a.invalid/v1")
    made = yaml.safe_load(biollm("config", "--litellm").out)
    (entry,) = made["model_list"]
    assert entry["litellm_params"]["api_key"] == "os.environ/FIRST_KEY"


@pytest.mark.parametrize("kind", ["models", "providers", "cluster"])
def test_config_prints_each_schema(kind: str, biollm: Biollm) -> None:
    assert kind in biollm("config", "--schema", kind).json["properties"]


def test_lenient_turns_unknown_keys_into_warnings(waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first={"base_url": "https://a.invalid", "colour": "red"})
    assert biollm("config", "--check").code == 78
    ran = biollm("config", "--check", "--lenient")
    assert ran.code == 0
    assert "providers.first.colour: is not a known key." in ran.err


def test_init_writes_once_and_what_it_writes_is_right(
    biollm: Biollm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-openai-0123456789")
    ran = biollm("init")
    folder = tmp_path / "xdg-config" / "biollm"
    assert sorted(path.name for path in folder.iterdir()) == ["cluster.yaml", "models.yaml", "providers.yaml"]
    assert "found OPENAI_API_KEY\n" in ran.out
    assert "sk-planted" not in ran.out
    assert biollm("config", "--check").code == 0
    (folder / "models.yaml").write_text("models: {} # mine\n")
    assert "kept" in biollm("init").out
    assert (folder / "models.yaml").read_text() == "models: {} # mine\n"


# --- Help --------------------------------------------------------------------------------------------------------


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, (*path, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))
PROMISED = "complete explain models providers health config init login render-slurm fit pull up status logs down doctor"


def test_every_promised_command_exists() -> None:
    assert {(name,) for name in PROMISED.split()} | {("embedded", "pull"), ("models", "add")} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_explains_every_option(path: tuple[str, ...], biollm: Biollm) -> None:
    ran = biollm(*path, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert biollm(*path, "-h").out == ran.out
    for parameter in COMMANDS[path].params:
        assert parameter.help, f"{parameter.name} has no help"
        if parameter.param_type_name == "option":
            assert max(parameter.opts, key=len) in ran.out
    listed = ran.out.partition("Commands:\n")[2]
    assert "...\n" not in listed, "a command's first sentence is too long for the list"


def test_version_is_one_line(biollm: Biollm) -> None:
    ran = biollm("--version")
    assert ran.out.split()[0] == "biollm"
    assert len(ran.out.splitlines()) == 1


# --- Processes ---------------------------------------------------------------------------------------------------

LIGHT = [
    ["--help"], ["--version"], ["models"], ["providers"], ["explain", "why?"], ["config"], ["config", "--check"],
    ["config", "--litellm"], ["config", "--schema", "models"], ["init"], ["health"], ["fit"],
    ["render-slurm", "qwen-coder-32b"],
]  # fmt: skip
LOADED = "import sys; from biollm.cli.app import _run; _run(); print('\\n', *sys.modules, file=sys.stderr)"


@pytest.mark.slow
@pytest.mark.parametrize("argv", LIGHT, ids=" ".join)
def test_only_completions_import_litellm(argv: list[str], waterfall: Waterfall) -> None:
    waterfall(first="http://127.0.0.1:9/v1")
    ran = subprocess.run([sys.executable, "-c", LOADED, *argv], capture_output=True, text=True, timeout=60)
    loaded = set(ran.stderr.splitlines()[-1].split())
    assert "biollm.cli" in loaded, ran.stderr
    assert not loaded & {"litellm", "openai", "xllamacpp", "vllm"}
    if argv[0].startswith("--"):
        assert not loaded & {"pydantic", "yaml", "httpx", "sqlite3", "rich"}


@pytest.mark.slow
def test_ctrl_c_ends_at_once_with_130(net: Loopback, waterfall: Waterfall) -> None:
    server = net.serve(then=HANG)
    waterfall(first=server)
    process = subprocess.Popen([PROGRAM, "complete", "why?"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _until(lambda: server.completions)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("biollm: interrupted\n")
    assert "Traceback" not in err


def _until(condition: Callable[[], Any]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within 60 s")


@pytest.mark.slow
def test_a_process_leaves_nothing_on_stderr_but_its_own_words(net: Loopback, waterfall: Waterfall) -> None:
    waterfall(first=net.refusing(), second=net.serve())
    ran = subprocess.run([PROGRAM, "complete", "why?", "-q"], input="log", capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "All is well.\n", "")


def test_a_closed_stdin_is_no_input(waterfall: Waterfall) -> None:
    waterfall(first="http://127.0.0.1:9/v1")
    ran = subprocess.run(["sh", "-c", f"{PROGRAM} complete <&-"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.startswith("biollm: The prompt is empty.\n")


def test_a_reader_that_leaves_early_is_no_error(waterfall: Waterfall) -> None:
    waterfall(first="http://127.0.0.1:9/v1")
    ran = subprocess.run(["sh", "-c", f"{PROGRAM} config | head -1"], capture_output=True, text=True, timeout=60)
    assert len(ran.stdout.splitlines()) == 1
    assert ran.stderr == ""


def _on_a_terminal(*argv: str, **environment: str) -> str:
    """Return what a command shows on a terminal."""
    here, there = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, *argv], stdin=there, stdout=there, stderr=there, env={**os.environ, **environment}
    )
    os.close(there)
    shown = b""
    try:
        while part := os.read(here, 65536):
            shown += part
    except OSError:  # Linux says EIO when the other end is closed
        pass
    os.close(here)
    assert process.wait(60) == 0
    return shown.decode()


def test_a_terminal_gets_bold_heads_unless_no_color(waterfall: Waterfall) -> None:
    waterfall(first="http://127.0.0.1:9/v1")
    assert "\x1b[1m#  model" in _on_a_terminal("models", TERM="xterm")
    assert "\x1b" not in _on_a_terminal("models", TERM="xterm", NO_COLOR="1")


def test_at_80_columns_lines_end_between_words(waterfall: Waterfall) -> None:
    limits = {"rate_limit": ["30/min", "1000/day"], "token_limit": "120k/min", "budget": "10 USD/month"}
    waterfall(first={"base_url": "http://127.0.0.1:9/v1", **limits})
    shown = _on_a_terminal("providers", TERM="xterm", NO_COLOR="1", COLUMNS="80")
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    words = shown.split()
    assert {"30/min,", "1000/day,", "tokens/min,", "USD/month"} <= {*words}


@pytest.mark.slow
def test_a_terminal_gets_markdown_rendered(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.serve(text="It is **memory**."))
    shown = _on_a_terminal("complete", "why?", TERM="xterm")
    assert "asking first/small" in shown
    assert "memory" in shown
    assert "**" not in shown
    assert biollm("complete", "why?").out == "It is **memory**.\n"


# --- Secrets -----------------------------------------------------------------------------------------------------


def test_no_command_and_no_file_shows_a_key(
    net: Loopback, waterfall: Waterfall, biollm: Biollm, state: Path, tmp_path: Path
) -> None:
    file = tmp_path / "third.key"
    file.write_text("sk-planted-third-0123456789\n")
    file.chmod(0o600)
    waterfall(
        first=net.serve(then=HTTP_401_ECHO),
        second=net.serve(then=Behaviour(500, body="you sent AUTHORIZATION")),
        third={"base_url": net.serve().url, "key_file": str(file)},
    )
    lines = [
        "complete why? -v",
        "complete why? --json",
        "explain",
        "explain --json",
        "providers --json",
        "models --json",
        "health",
    ]
    lines += [
        "complete why? --provider first -v",
        "config",
        "config --json",
        "config --litellm",
        "health --json",
        "init",
    ]
    for line in lines:
        ran = biollm(*line.split())
        assert ran.code in (0, 77), line
        assert "sk-planted" not in ran.out + ran.err, line
    _records(state)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path != file]
    assert any(path.suffix == ".db" for path in kept)
    assert not [path for path in kept if b"sk-planted" in path.read_bytes()]


def _records(state: Path) -> list[Any]:
    """Return the history, once what this process wrote is on disk."""
    with get_model_client():
        pass
    return list(Ledger(state).history())


def test_explain_takes_what_complete_takes(net: Loopback, waterfall: Waterfall, tmp_path: Path) -> None:
    small = {"base_url": net.serve().url, "models": ["tight"]}
    waterfall({"models": {"tight": {"type": "api", "context_length": 4_000}}}, first=small)
    (tmp_path / "big.log").write_text("one two three four five six seven\n" * 10_000)
    command = [Path(sys.executable).with_name("biollm"), "explain", "why?"]

    def explain(*options: str, stdin: str = "") -> str:
        return subprocess.run([*command, *options], input=stdin, capture_output=True, text=True, timeout=60).stdout

    file = ["-f", str(tmp_path / "big.log")]
    assert "first/tight would answer." in explain(*file)
    assert "its context is 4000" in explain(*file, "--no-condense")
    assert "its context is 4000" in explain("--no-condense", stdin=(tmp_path / "big.log").read_text())


def test_the_line_under_an_answer_gives_each_attempt_its_time(
    net: Loopback, waterfall: Waterfall, biollm: Biollm
) -> None:
    waterfall(first=net.serve(then=HANG), second=net.serve())
    line = biollm("complete", "why?", "--timeout", "1").err.splitlines()[-1]
    assert re.match(r"— first/small 1\.\d s without an answer, then second/small 0\.\d s, ", line)


@pytest.mark.parametrize(
    ("streams", "code", "out", "err"),
    [
        ("2>&-", 0, "All is well.\n", ""),
        ("2>/dev/full", 0, "All is well.\n", ""),
        (">&-", 1, "", "biollm: stdout is closed: there is nowhere to print to.\n"),
        (">/dev/full", 1, "", "biollm: stdout: No space left on device\n"),
        ("<&-", 0, "All is well.\n", None),
    ],
)
def test_a_closed_or_full_stream_is_a_sentence(
    net: Loopback, waterfall: Waterfall, streams: str, code: int, out: str, err: str | None
) -> None:
    waterfall(first=net.serve())
    command = f"{Path(sys.executable).with_name('biollm')} complete hi -q {streams}"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (ran.returncode, ran.stdout) == (code, out)
    assert err is None or ran.stderr == err


def test_an_option_without_effect_is_said(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.serve())
    assert "--wait has no effect without --start.\n" in biollm("complete", "hi", "--wait", "3").err


def test_a_state_folder_that_cannot_be_made_is_said(
    waterfall: Waterfall, net: Loopback, biollm: Biollm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall(first=net.serve())
    (tmp_path / "file").touch()
    monkeypatch.setenv("BIOLLM_STATE_DIR", str(tmp_path / "file" / "state"))
    assert "file/state cannot be written: requests since then are missing here.\n" in biollm("usage").err


@pytest.mark.skipif(os.getuid() != 0 or not Path("/dev/full").exists(), reason="mounts a small file system")
@pytest.mark.parametrize("command", ["usage", "providers", "top"])
def test_a_full_state_folder_is_said(
    waterfall: Waterfall, net: Loopback, biollm: Biollm, state: Path, command: str
) -> None:
    waterfall(first=net.serve())
    with full_disk(state):
        assert f"{state} is on a full disk: requests since then are missing here.\n" in biollm(command).err


def test_a_usage_error_is_json_too(net: Loopback, waterfall: Waterfall, biollm: Biollm) -> None:
    waterfall(first=net.serve())
    ran = biollm("complete", "hi", "--provider", "nope", "--json")
    assert (ran.code, ran.json["exit_code"], ran.json["attempts"]) == (2, 2, [])
    assert ran.json["error"] == "There is no provider named 'nope'."
