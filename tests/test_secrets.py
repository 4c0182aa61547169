"""No key shows anywhere, and none goes where it does not belong, however hostile the servers.

Recognisable keys lie in every place that a key can come from. The servers send back what they were sent, whole, cut off
and in the middle of a stream; then whatever biollm printed, logged, raised or wrote is searched.
"""

from __future__ import annotations

import json
import logging
import re
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import behaviours as b
import pytest
from behaviours import Behaviour
from provider import Loopback, Server

from biollm.client import Client, Completion, CompletionError, InterruptedStreamError, get_model_client

BIOLLM = str(Path(sys.executable).with_name("biollm"))
MARK = re.compile(r"PLANTED-?[a-z]+", re.IGNORECASE)  # in every planted key, and in half of one
KEYS = {
    name: f"sk-PLANTED-{name}-0123456789abcdefghijklmnop"
    for name in ("env", "file", "lab", "core", "gemini", "vllm", "stream", "last")
}
FOREIGN = {
    name: f"sk-PLANTED-foreign-{name.lower()}"
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY", "ANTHROPIC_API_KEY", "HOSTED_VLLM_API_KEY",
                 "LITELLM_API_KEY", "HF_TOKEN")
}  # fmt: skip
COPILOT = {"login": "gho_PLANTED-login-0123456789", "token": "tid=PLANTED-token-0123456789"}
ECHOES = {
    "401": b.error(401, "Refused: AUTHORIZATION"),
    "400": b.error(400, "AUTHORIZATION may not ask that."),
    "429": b.error(429, "Too much of AUTHORIZATION"),
    "500": Behaviour(500, body="Traceback: headers={'Authorization': 'AUTHORIZATION'}", content_type="text/plain"),
    "html": Behaviour(body="<html>AUTHORIZATION</html>", content_type="text/html"),
    "text": Behaviour(403, body="AUTHORIZATION", content_type="text/plain"),
    "json": Behaviour(body='{"error": "AUTHORIZATION"}'),
    **{f"cut-{n}": b.error(503, "x" * n + " AUTHORIZATION is overloaded") for n in (150, 170, 180, 190)},
}


@pytest.fixture
def servers(net: Loopback) -> dict[str, Server]:
    return {name: net.serve(then=b.error(400, "AUTHORIZATION")) for name in (*KEYS, "copilot")}


@pytest.fixture
def planted(
    servers: dict[str, Server], waterfall: Callable[..., Path], state: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Server]:
    """A waterfall with a key from each source, and keys of others in the environment. The last rung answers."""
    for name, secret in FOREIGN.items():
        monkeypatch.setenv(name, secret)
    folder = state / "github_copilot" / "default"
    for made in (state, folder.parent, folder):
        made.mkdir(mode=0o700)
    token = {"token": COPILOT["token"], "expires_at": time.time() + 1500, "endpoints": {"api": servers["copilot"].url}}
    for file, text in (("access-token", COPILOT["login"]), ("api-key.json", json.dumps(token))):
        (folder / file).write_text(text)
        (folder / file).chmod(0o600)
    key_file = state.parent / "key"
    key_file.write_text(KEYS["file"])
    key_file.chmod(0o600)
    accounts = [{"name": name, "env_key": f"{name.upper()}_KEY"} for name in ("lab", "core")]
    waterfall(
        env=servers["env"],
        file={"base_url": servers["file"].url, "key_file": str(key_file)},
        both={"base_url": servers["lab"].url, "accounts": accounts},
        gemini={"base_url": servers["gemini"].url, "litellm_provider": "gemini", "env_key": "GEMINI_OWN_KEY"},
        vllm={"base_url": servers["vllm"].url, "litellm_provider": "hosted_vllm", "env_key": "VLLM_KEY"},
        github_copilot={"litellm_provider": "github_copilot", "accounts": [{"name": "default"}]},
        nobody={"base_url": servers["stream"].url, "env_key": "NOT_SET_KEY"},
        last=servers["last"],
    )
    monkeypatch.delenv("NOBODY_KEY", raising=False)
    for name, secret in KEYS.items():
        monkeypatch.setenv("GEMINI_OWN_KEY" if name == "gemini" else f"{name.upper()}_KEY", secret)
    return servers


def everything(told: Completion | BaseException) -> str:
    """Return all that a user, a notebook or a bug report would show of an answer or an error."""
    texts = [repr(told), str(told), repr(vars(told)) if isinstance(told, BaseException) else ""]
    if isinstance(told, Completion):
        texts += [repr(told.raw), json.dumps(told.raw)]
    else:
        texts += traceback.format_exception(told)
    return "\n".join([*texts, repr(told.attempts)])


def search(text: str) -> list[str]:
    """Return what looks like a planted key, or the beginning of one, with what is around it."""
    return [text[max(0, found.start() - 80) : found.end() + 40] for found in MARK.finditer(text)]


def written(state: Path) -> str:
    """Return all that lies under the state folder, but where Copilot keeps its tokens; nobody else may read any."""
    texts: list[str] = []
    for path in state.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        if path.is_file() and "github_copilot" not in path.parts:
            texts.append(path.read_bytes().decode("latin-1"))
    return "\n".join(texts)


def told(client: Client, stream: bool) -> Completion | CompletionError:
    """Return the answer, or the error."""
    try:
        return [*client.stream("hi")][-1].completion if stream else client.complete("hi")  # type: ignore
    except CompletionError as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", ECHOES)
def test_a_key_sent_back_shows_nowhere(
    planted: dict[str, Server],
    state: Path,
    echo: str,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for server in planted.values():
        server.behaviour = ECHOES[echo]
    planted["last"].script = [b.OK]
    with caplog.at_level(logging.DEBUG), get_model_client() as client:
        first, second = told(client, stream), told(client, stream)
    assert any("***" in attempt.reason for attempt in (*first.attempts, *second.attempts)) or echo in ("html", "json")
    assert search(everything(first) + everything(second)) == []
    assert search(caplog.text) == []
    assert search("".join(capfd.readouterr())) == []
    assert search(repr(client) + repr(vars(client)) + repr(client.config) + repr(client.explain())) == []
    assert search(written(state)) == []


def test_a_key_in_the_middle_of_a_stream_shows_nowhere(
    planted: dict[str, Server], caplog: pytest.LogCaptureFixture
) -> None:
    for server in planted.values():
        server.behaviour = Behaviour(fail=3, failure="EngineCore died of AUTHORIZATION")
    with caplog.at_level(logging.DEBUG), pytest.raises(InterruptedStreamError) as caught:
        list(get_model_client().stream("hi"))
    assert "died of ***" in str(caught.value)
    assert search(everything(caught.value) + caplog.text) == []


def test_each_server_gets_its_own_key_and_no_other(planted: dict[str, Server]) -> None:
    for server in planted.values():
        server.behaviour = b.HTTP_503
    answers = told(get_model_client(), stream=False)
    own = {**KEYS, "copilot": COPILOT["token"]}
    for name, server in planted.items():
        sent = "\n".join(f"{request.path} {request.headers} {request.body}" for request in server.requests)
        expected = {"lab", "core"} if name == "lab" else set[str]() if name in ("core", "stream") else {name}
        found = {name for name, secret in (own | FOREIGN).items() if secret in sent}
        assert (found, bool(search(sent))) == (expected, bool(expected))
    assert "NOT_SET_KEY" in str(answers), "who lacks a key is named, and asked nothing"


IN_A_FRESH_PROCESS = """
import logging, traceback
from biollm import client, errors
logging.basicConfig(level=logging.DEBUG)
try:
    client.get_model_client().complete("hi")
except errors.BiollmError as error:
    traceback.print_exc()
    print(repr(error), error.attempts, *[f"REASON {attempt.reason}" for attempt in error.attempts], sep="\\n")
"""


@pytest.mark.slow
def test_a_proxys_password_shows_nowhere(
    net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = net.serve(then=b.PROXY_407).url.removesuffix("/v1")
    monkeypatch.setenv("HTTPS_PROXY", proxy.replace("//", "//ann:sk-PLANTED-password@"))
    waterfall(
        first="https://nobody.invalid/v1",
        second={"base_url": "https://nobody.invalid/v2", "litellm_provider": "hosted_vllm", "env_key": "FIRST_KEY"},
    )
    # LiteLLM keeps its HTTP clients, and with them the proxy of their first use.
    done = subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], capture_output=True, text=True)
    assert done.stdout.count("REASON the proxy refused (HTTP 407)") == 2, done.stdout[-1000:]
    assert "DEBUG" in done.stderr
    assert search(done.stdout + done.stderr) == []


@pytest.mark.slow
def test_no_command_prints_a_key(planted: dict[str, Server], state: Path) -> None:
    for server in planted.values():
        server.behaviour = b.HTTP_401_ECHO
    every = (
        "complete hi --json", "complete hi --stream -v", "explain hi", "explain --json", "providers", "providers --json",
        "health", "health --json", "config", "config --json", "config --litellm", "config --check", "models --json",
        "doctor",
    )  # fmt: skip
    for command in every:
        done = subprocess.run([BIOLLM, *command.split()], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert "Traceback" not in done.stderr, command
        assert done.stdout + done.stderr, command
        assert search(done.stdout + done.stderr) == [], command
    assert search(written(state)) == []


@pytest.mark.slow
def test_no_list_of_processes_shows_a_key_or_a_prompt_from_a_pipe(planted: dict[str, Server]) -> None:
    planted["env"].behaviour = b.HANG
    command = subprocess.Popen([BIOLLM, "complete", "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert command.stdin
    command.stdin.write(b"sk-PLANTED-prompt")
    command.stdin.close()
    try:
        while not planted["env"].requests:
            time.sleep(0.02)
        assert search("".join(command_lines())) == []
    finally:
        command.kill()
        command.wait()


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_text(errors="replace")
