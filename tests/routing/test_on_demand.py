"""Requests that wait for a server's start on the cluster: they end in time, and hold up nobody. Slurm's commands are
small scripts; the job is never started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import until
from provider import Loopback

from biollm.client import DeadlineError, get_model_client

pytestmark = pytest.mark.slow  # each waits for seconds

Gateway = Callable[..., dict[str, Any]]
CHAT, KEY, OTHER = "/v1/chat/completions", "may-0123456789abcdef", "not-0123456789abcdef"


@pytest.fixture
def calls(tmp_path: Path, waterfall: Callable[..., Path], net: Loopback, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configure a local model that could be started, behind one that answers; return the list of calls of Slurm."""
    (tmp_path / "bin").mkdir()
    calls = tmp_path / "calls.txt"
    for command, text in {
        "sbatch": "echo 41",
        "squeue": "echo '41|PENDING|Resources|N/A|'",
        "scontrol": "true",
    }.items():
        script = tmp_path / "bin" / command
        script.write_text(f'#!/bin/sh\necho {command} "$@" >>{calls}\n{text}\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("bin/vllm", "config.json", "model.safetensors"):
        (tmp_path / name).touch()
    own = {"type": "local", "path": str(tmp_path), "gpus_required": 1}
    cluster = {"run_dir": str(tmp_path / "run"), "environment": {"venv": str(tmp_path)}, "gpus_per_node": 8}
    top = {"models": {"own": own}, "cluster": cluster}
    folder = waterfall(top, mine={"type": "local", "models": ["own"]}, other=net.serve())
    (folder / "gateway_keys.yaml").write_text(f"may: {{key: {KEY}, start_local: true}}\nmaynot: {{key: {OTHER}}}\n")
    (folder / "gateway_keys.yaml").chmod(0o600)
    return calls


def submitted(calls: Path) -> bool:
    return calls.exists() and "sbatch" in calls.read_text()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait", [None, 600])
def test_the_deadline_bounds_the_wait_and_the_job_stays(calls: Path, wait: float | None, stream: bool) -> None:
    client = get_model_client(model="own", start_local=True, wait=wait, deadline=4)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: list(client.stream("hi")) if stream else client.complete("hi"))
        with pytest.raises(DeadlineError, match="within the deadline of 4 s") as caught:
            asked.result(30)
    assert 3 < time.monotonic() - began < 15
    assert [attempt.reason for attempt in caught.value.attempts] == ["no server is up: biollm up own"]
    assert submitted(calls)
    assert "scancel" not in calls.read_text()


def test_ctrl_c_ends_the_wait_at_once_and_the_job_stays(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 20\n")  # the controller is slow as well
    command = [
        sys.executable,
        "-c",
        "from biollm.cli import main; main()",
        "complete",
        "hi",
        "--model",
        "own",
        "--start",
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=-1, text=True, start_new_session=True) as asking:
        until(lambda: submitted(calls))
        time.sleep(2)
        asking.send_signal(signal.SIGINT)
        assert asking.wait(8) == 130
    assert "scancel" not in calls.read_text()


@pytest.fixture
def waiting(calls: Path, gateway: Gateway, runtime: Path) -> Iterator[tuple[httpx.Client, str]]:
    """Let more requests wait at a gateway than a pool has threads; give a client of its socket, and its TCP address."""
    told = gateway("--port", "0")
    transport = httpx.HTTPTransport(uds=str(runtime / "gateway.sock"), limits=httpx.Limits(max_connections=200))
    body = {
        "model": "own",
        "messages": [{"role": "user", "content": "hi"}],
        "biollm": {"start_local": True, "wait": 25},
    }
    with httpx.Client(transport=transport, base_url="http://x", timeout=60) as client:
        threads = [threading.Thread(target=client.post, args=(CHAT,), kwargs={"json": body}) for _ in range(48)]
        for thread in threads:
            thread.start()
        until(lambda: submitted(calls))
        time.sleep(3)
        yield client, told["url"]
        for thread in threads:
            thread.join()


def test_who_waits_for_a_start_holds_up_nobody(waiting: tuple[httpx.Client, str], calls: Path) -> None:
    client, _ = waiting
    for path in ("/ready", "/metrics", "/", "/v1/models"):
        assert client.get(path, timeout=10).status_code == 200, path
    answer = client.post(CHAT, json={"model": "small", "messages": [{"role": "user", "content": "hi"}]}, timeout=10)
    assert answer.json()["model"] == "other/small"
    assert calls.read_text().count("sbatch --parsable") == 1, "one job for all of them"


def test_a_gateways_key_starts_servers_only_where_its_file_says_so(calls: Path, gateway: Gateway) -> None:
    url = gateway("--port", "0")["url"]
    ours = {"start_local": True, "wait": 3}
    body = {"model": "own", "messages": [{"role": "user", "content": "hi"}], "biollm": ours}
    with httpx.Client(base_url=url, timeout=60) as client:
        refused = client.post(CHAT, json=body, headers={"authorization": f"Bearer {OTHER}"})
        assert refused.status_code == 403
        assert "start_local: true" in refused.json()["error"]["message"]
        assert not submitted(calls)
        asked = client.post(CHAT, json=body, headers={"authorization": f"Bearer {KEY}"})
        assert "Not ready within 3 s" in asked.json()["error"]["message"]
        assert submitted(calls)
