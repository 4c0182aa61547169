"""The real LiteLLM proxy runs what `biollm config --litellm` prints, as it stands."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from behaviours import HTTP_401, HTTP_500, OK
from programs import end
from provider import Loopback, Server

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]  # the first run installs 640 MB
START_SECONDS = 180  # 15 on an idle machine
HERE = "127.0.0.1"


def printed() -> str:
    """Return the config.yaml that the command prints."""
    command = [Path(sys.executable).parent / "biollm", "config", "--litellm"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def proxy(litellm: Path, config: str, folder: Path) -> Generator[httpx.Client]:
    """Run the proxy on `config`, with this process' variables; give a client of it."""
    (folder / "config.yaml").write_text(config)
    with socket.socket() as free:
        free.bind((HERE, 0))
        port = free.getsockname()[1]
    master, log = f"sk-{secrets.token_hex(32)}", folder / "proxy.log"
    env = {**os.environ, "HOME": str(folder), "LITELLM_MASTER_KEY": master, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [litellm, "--config", "config.yaml", "--host", HERE, "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
    headers = {"Authorization": f"Bearer {master}"}
    try:
        with httpx.Client(base_url=f"http://{HERE}:{port}", headers=headers, timeout=60, trust_env=False) as client:
            _await_start(process, client, log)
            yield client
    finally:
        end(process)


def _await_start(process: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            if client.get("/health/readiness").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"The proxy did not start:\n{log.read_text()[-3000:]}")


def ask(client: httpx.Client, group: str = "biollm") -> str:
    """Return the answer of one of the two groups."""
    body = {"model": group, "messages": [{"role": "user", "content": "hi"}]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.is_success, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def groups(client: httpx.Client) -> set[str]:
    """Return the names that the proxy offers."""
    return {model["id"] for model in client.get("/v1/models").json()["data"]}


def deployments(client: httpx.Client) -> list[str]:
    """Return the ids behind them, in the proxy's order."""
    return [entry["model_info"]["id"] for entry in client.get("/model/info").json()["data"]]


def ids(config: str) -> list[str]:
    """Return the ids that a config.yaml names."""
    return [entry["model_info"]["id"] for entry in yaml.safe_load(config)["model_list"]]


def sent_keys(server: Server) -> set[str]:
    """Return what the server was shown as keys."""
    return {request.headers["authorization"].removeprefix("Bearer ") for request in server.completions}


def test_the_proxy_serves_the_waterfall_and_hops_where_biollm_would(
    litellm_proxy: Path,
    net: Loopback,
    waterfall: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, keyless, last = net.serve(text="from first"), net.serve(then=HTTP_401), net.serve(text="from last")
    many = [f"m{at}" for at in range(7)]  # more rungs than LiteLLM's 5 fallbacks
    waterfall(
        first={"base_url": first.url, "models": many, "rate_limit": "6/min"},
        keyless=keyless,
        last={"type": "local", "base_url": last.url},
    )
    (tmp_path / "config" / "models.yaml").write_text("models: {small: {hf_id: lab/small, type: local}}")
    monkeypatch.delenv("KEYLESS_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-elsewhere-0123456789")
    config = printed()
    assert "sk-planted" not in config
    with proxy(litellm_proxy, config, tmp_path) as client:
        assert groups(client) == {"biollm", "biollm-local"}
        assert sorted(deployments(client)) == sorted(ids(config))

        assert (ask(client), ask(client, "biollm-local")) == ("from first", "from first")
        assert {request.body["model"] for request in first.completions} == {"m0"}

        first.behaviour = HTTP_500
        assert (ask(client), ask(client, "biollm-local")) == ("from last", "from last")
        assert [request.body["model"] for request in first.completions[2:]] == many * 2

        first.behaviour = OK
        for _ in range(14):  # 6 a minute, and at most one new minute
            assert ask(client) == "from first"
        assert {"m0", "m1"} <= {request.body["model"] for request in first.completions[16:]}, "m0 has its limit"
    assert sent_keys(first) == {"sk-planted-first-0123456789"}
    assert sent_keys(keyless) == sent_keys(last) == {"none"}, "a missing key is not replaced by another's"


def test_the_proxy_loads_the_shipped_defaults(
    litellm_proxy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("LIGHTNING_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY")
    for name in names:
        monkeypatch.setenv(name, f"sk-planted-{name.lower()}-0123456789")
    config = printed()
    assert "sk-planted" not in config
    assert all(f"os.environ/{name}\n" in config for name in names)
    with proxy(litellm_proxy, config, tmp_path) as client:
        assert groups(client) == {"biollm"}
        assert sorted(deployments(client)) == sorted(ids(config)) != []
