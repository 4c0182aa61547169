"""`biollm run`: what each agent gets, and that its key works, says who uses it and holds its data policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, until
from provider import Loopback

from biollm._runtime import ledger
from biollm.cli.agents import AGENTS
from biollm.gateway import server as _serve

Biollm = Callable[..., Ran]
Waterfall = Callable[..., Path]
PROGRAM = Path(sys.executable).with_name("biollm")
FAKE = """#!{python}
import json, os, sys, urllib.request
base = os.environ.get("ANTHROPIC_BASE_URL", "").rstrip("/") or os.environ.get("OPENAI_BASE_URL", "").removesuffix("/v1")
files = [os.environ[name] for name in ("QWEN_CODE_SYSTEM_DEFAULTS_PATH", "AIDER_MODEL_METADATA_FILE") if name in os.environ]
told = {{"env": dict(os.environ), "argv": sys.argv[1:], "files": {{file: json.load(open(file)) for file in files}}}}
if sys.argv[-1] == "ask":
    body = {{"model": os.environ["OPENAI_MODEL"], "messages": [{{"role": "user", "content": "hi"}}]}}
    headers = {{"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}}
    asked = urllib.request.Request(base + "/v1/chat/completions", json.dumps(body).encode(), headers)
    answer = urllib.request.urlopen(asked)
    told |= {{"answer": json.load(answer)["choices"][0]["message"]["content"], "policy": answer.headers["x-biollm-policy"]}}
print(json.dumps(told))
"""


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program with the name of each agent on the PATH, which prints what it got."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in AGENTS:
        (folder / name).write_text(FAKE.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def ends(runtime: Path) -> Iterator[None]:
    """End the gateway that a test started."""
    yield
    assert _serve.stop(30)


def run(*words: str) -> Any:
    """Return what the agent printed; it replaces the process of `biollm run`."""
    done = subprocess.run([PROGRAM, "run", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_an_agent_asks_with_a_key_of_its_own(
    net: Loopback, waterfall: Waterfall, ends: None, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall(first=net.serve(text="An answer."))
    told = run("qwen", "--policy", "no_training", "--", "ask")  # starts the gateway
    assert (told["answer"], told["policy"]) == ("An answer.", "no_training")
    gateway = _serve.running()
    assert gateway and told["env"]["OPENAI_BASE_URL"] == f"{gateway['url']}/v1"
    assert run("qwen", "ask")["policy"] == "any"
    monkeypatch.setenv("BIOLLM_LOCAL_ONLY", "1")  # of this shell; the gateway runs without it
    assert run("qwen", "ask")["policy"] == "local_only"
    key = (state / "gateway.key").read_text().strip()
    assert key not in json.dumps(told)
    until(lambda: len(list(ledger().history())) == 3)  # the gateway writes them after it has answered
    assert [each.tags for each in ledger().history()] == [{"key": "random", "agent": "qwen"}] * 3


@pytest.mark.slow
def test_each_agent_gets_the_address_the_key_and_the_context(
    net: Loopback, waterfall: Waterfall, gateway: Callable[..., dict[str, Any]], state: Path
) -> None:
    models = {"small": {"type": "api", "context_length": 40_000}}
    waterfall({"models": models}, first=net.serve())
    url = gateway("--port", "0")["url"]
    seen = {name: run(name, "--model", "first/small", "--", "-x", "a b") for name in AGENTS}
    for name, told in seen.items():
        assert told["argv"][-2:] == ["-x", "a b"], name
        assert not any("biollm-agent." in word for word in told["argv"]), name
        assert sum(f"biollm-agent.{name}.any." in value for value in told["env"].values()) == 1, name
        assert "127.0.0.1" in told["env"]["NO_PROXY"]

    codex = dict(word.removeprefix("-c").split("=", 1) for word in seen["codex"]["argv"][:-2])
    assert {name: json.loads(value) for name, value in codex.items()} == {
        "model": "first/small",
        "model_provider": "biollm",
        "model_context_window": 40_000,
        "model_providers.biollm.name": "biollm",
        "model_providers.biollm.base_url": f"{url}/v1",
        "model_providers.biollm.env_key": "BIOLLM_AGENT_KEY",
        "model_providers.biollm.wire_api": "responses",
        "model_providers.biollm.stream_max_retries": 20,
    }
    claude = {name: value for name, value in seen["claude"]["env"].items() if name.startswith(("ANTHROPIC", "CLAUDE"))}
    assert (claude["ANTHROPIC_BASE_URL"], claude["ANTHROPIC_MODEL"]) == (url, "first/small")
    assert claude["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "40000"
    opencode = json.loads(seen["opencode"]["env"]["OPENCODE_CONFIG_CONTENT"])
    assert opencode["model"] == "biollm/first/small"
    assert opencode["provider"]["biollm"]["models"]["first/small"]["limit"] == {"context": 40_000, "output": 10_000}
    assert opencode["provider"]["biollm"]["options"] == {"baseURL": f"{url}/v1", "apiKey": "{env:BIOLLM_AGENT_KEY}"}
    assert seen["qwen"]["argv"][:4] == ["--auth-type", "openai", "--model", "first/small"]
    ((file, settings),) = seen["qwen"]["files"].items()
    assert settings == {"model": {"generationConfig": {"contextWindowSize": 40_000}}}
    assert Path(file).parent == state / "agents" and Path(file).stat().st_mode & 0o777 == 0o600
    assert Path(file).parent.stat().st_mode & 0o777 == 0o700
    assert seen["aider"]["env"]["AIDER_MODEL"] == "openai/first/small"
    ((_, facts),) = seen["aider"]["files"].items()
    assert facts["openai/first/small"]["max_input_tokens"] == 40_000


@pytest.mark.slow
def test_an_agents_own_key_is_not_taken_for_a_providers(
    net: Loopback, waterfall: Waterfall, gateway: Callable[..., dict[str, Any]]
) -> None:
    waterfall(first=net.serve(text="An answer."), second={"base_url": net.serve().url, "env_key": "OPENAI_API_KEY"})
    gateway("--port", "0")
    env = run("qwen")["env"]
    done = subprocess.run([PROGRAM, "complete", "hi"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("An answer.\n", 0)
    assert "asking the gateway" in done.stderr and "was started without" not in done.stderr


def test_print_shows_it_without_the_key(waterfall: Waterfall, runtime: Path, biollm: Biollm, state: Path) -> None:
    waterfall(first="http://127.0.0.1:1/v1")
    ran = biollm("run", "qwen", "--print", "--", "-p", "a b")
    assert ran.code == 0 and ran.err == ""
    assert ran.out.splitlines() == [
        "export OPENAI_BASE_URL=http://127.0.0.1:PORT/v1",
        "export OPENAI_API_KEY='***'",
        "export OPENAI_MODEL=biollm",
        f"export QWEN_CODE_SYSTEM_DEFAULTS_PATH={state}/agents/qwen.json",
        f'# {state}/agents/qwen.json: {{"model": {{"generationConfig": {{"contextWindowSize": 32768}}}}}}',
        "qwen --auth-type openai --model biollm -p 'a b'",
    ]
    assert "unset ANTHROPIC_API_KEY" in biollm("run", "claude", "--print").out
    wrong = biollm("run", "codex", "--print", "--model", "smal")
    assert (wrong.code, wrong.out) == (2, "") and "Did you mean 'small'?" in wrong.err
    for name in AGENTS:
        assert "biollm-agent." not in biollm("run", name, "--print").out
    assert _serve.running() is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["codexx"], 2, "There is no agent named 'codexx'.\nDid you mean 'codex'?"),
        (["codex"], 69, "codex is not installed.\nInstall it: npm install -g @openai/codex"),
    ],
)
def test_an_agent_that_is_not_there(
    waterfall: Waterfall, programs: Path, runtime: Path, biollm: Biollm, words: list[str], code: int, said: str
) -> None:
    waterfall(first="http://127.0.0.1:1/v1")
    (programs / "codex").unlink()
    ran = biollm("run", *words)
    assert ran.code == code and said in ran.err


def test_it_needs_the_gateway(waterfall: Waterfall, biollm: Biollm, monkeypatch: pytest.MonkeyPatch) -> None:
    waterfall(first="http://127.0.0.1:1/v1")
    assert "Unset BIOLLM_GATEWAY" in biollm("run", "codex").err  # it is off in the tests
    monkeypatch.setenv("BIOLLM_GATEWAY", "https://gateway.example")
    assert "BIOLLM_GATEWAY_KEY is not set" in biollm("run", "codex").err
    monkeypatch.setenv("BIOLLM_GATEWAY_KEY", "a-key-of-the-gateway")
    assert (
        "belongs" in biollm("run", "codex", "--local-only").err
        or "local_only" in biollm("run", "codex", "--local-only").err
    )


@pytest.mark.slow
def test_a_gateway_that_agents_cannot_use_is_named(
    net: Loopback, waterfall: Waterfall, gateway: Callable[..., dict[str, Any]], biollm: Biollm
) -> None:
    folder = waterfall(first=net.serve())
    gateway()
    ran = biollm("run", "codex")
    assert ran.code == 2 and "The running gateway has no TCP port, which agents need." in ran.err
    (folder / "models.yaml").write_text("models: {}\n")
    ran = biollm("run", "codex")
    assert ran.code == 2 and "has another configuration" in ran.err and "`biollm serve stop`" in ran.err


@pytest.mark.slow
def test_an_unknown_model_is_named_before_the_agent_starts(
    net: Loopback, waterfall: Waterfall, gateway: Callable[..., dict[str, Any]], biollm: Biollm
) -> None:
    waterfall(first=net.serve())
    gateway("--port", "0")
    ran = biollm("run", "codex", "--model", "smal")
    assert ran.code == 2 and "There is no model named 'smal'." in ran.err
