"""Two gateways on two hosts behind HAProxy, with one ledger on Redis. The hosts are network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import debian
import pytest
import yaml
from conftest import until

pytestmark = pytest.mark.real
HERE = Path(__file__).parent
HUB, GATEWAYS = "10.77.0.1", {"gw1": "10.77.0.11", "gw2": "10.77.0.12"}
KEY = "a-gateway-key-of-the-tests-0123456789"
START, SERVER_KEY = "ab" * 16, "the-key-of-the-start"
HAPROXY = f"""
defaults
  mode tcp
  timeout connect 1s
  timeout client 60s
  timeout server 60s
  retries 3
  option redispatch
frontend gateway
  bind {HUB}:8080
  default_backend gateways
backend gateways
  balance leastconn
  option httpchk GET /health
  default-server check inter 200ms fall 1 rise 1
  server gw1 {GATEWAYS["gw1"]}:8000
  server gw2 {GATEWAYS["gw2"]}:8000
"""


def missing(what: str) -> NoReturn:
    if os.environ.get("BIOLLM_REQUIRE_REAL") == "1":
        pytest.fail(f"required, but missing: {what}")
    pytest.skip(what)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        missing(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass
class Net:
    """A hub with a bridge, and a namespace per gateway."""

    root: Path
    limit: str = "100000/min"
    processes: list[subprocess.Popen[Any]] = field(default_factory=list[subprocess.Popen[Any]])

    def name(self, host: str) -> str:
        return f"biollm{os.getpid()}{host}"

    def __enter__(self) -> Net:
        hub = self.name("hub")
        run("ip", "netns", "add", hub)
        run("ip", "-n", hub, "link", "set", "lo", "up")
        run("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", hub, "addr", "add", f"{HUB}/24", "dev", "br0")
        run("ip", "-n", hub, "link", "set", "br0", "up")
        for host, address in GATEWAYS.items():
            run("ip", "netns", "add", self.name(host))
            run("ip", "-n", hub, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", self.name(host))
            run("ip", "-n", hub, "link", "set", host, "master", "br0", "up")
            run("ip", "-n", self.name(host), "addr", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", self.name(host), "link", "set", "eth0", "up")
            run("ip", "-n", self.name(host), "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for host in ("hub", *GATEWAYS):
            subprocess.run(["ip", "netns", "del", self.name(host)], capture_output=True)

    def start(self, host: str, *command: str | Path, **env: str) -> subprocess.Popen[str]:
        """Start a process on a host."""
        log = (self.root / f"{host}-{Path(command[0]).name}.log").open("a")
        words = ["ip", "netns", "exec", self.name(host), *map(str, command)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **env})
        self.processes.append(process)
        return process

    def get(self, url: str) -> tuple[int, str]:
        """Return the status and body of a request from the hub; 0 where nothing answers."""
        program = (
            "import sys, urllib.request, urllib.error\n"
            f"asked = urllib.request.Request(sys.argv[1], headers={{'Authorization': 'Bearer {KEY}'}})\n"
            "try: answer = urllib.request.urlopen(asked, timeout=2)\n"
            "except urllib.error.HTTPError as error: answer = error\n"
            "print(answer.status, answer.read().decode())"
        )
        words = ["ip", "netns", "exec", self.name("hub"), sys.executable, "-c", program, url]
        done = subprocess.run(words, capture_output=True, text=True)
        status, _, body = done.stdout.partition(" ")
        return int(status or 0), body.strip()

    def gateway(self, host: str) -> subprocess.Popen[str]:
        """Start a gateway, and wait until a balancer would send it requests."""
        for folder in ("state", "runtime"):
            (self.root / host / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        env = {
            "BIOLLM_CONFIG_DIR": str(self.root / "config"), "BIOLLM_STATE_DIR": str(self.root / host / "state"),
            "XDG_RUNTIME_DIR": str(self.root / host / "runtime"), "BIOLLM_GATEWAY_KEY": KEY, "FIRST_KEY": "sk-x",
        }  # fmt: skip
        command = [Path(sys.executable).parent / "biollm", "serve", "--host", GATEWAYS[host], "--port", "8000"]
        process = self.start(host, *command, "--drain", "1.5", **env)
        until(lambda: self.get(f"http://{GATEWAYS[host]}:8000/health")[0] == 200, 60)
        return process

    def asked(self) -> int:
        """Return the completions that the provider was asked for."""
        return int(self.get(f"http://{HUB}:9001/")[1])

    def ask(self, clients: int, seconds: float, how: str) -> subprocess.Popen[str]:
        """Let clients ask through the balancer."""
        words = [
            sys.executable,
            HERE / "ask_gateways.py",
            f"http://{HUB}:8080/v1",
            KEY,
            str(clients),
            str(seconds),
            how,
        ]
        return self.start("hub", *words)


@pytest.fixture
def net(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Net]:
    if not all(map(shutil.which, ("haproxy", "redis-server", "ip"))):
        with suppress(subprocess.CalledProcessError):
            debian.install("haproxy", "redis-server", "iproute2")
    if os.geteuid() != 0 or not all(map(shutil.which, ("haproxy", "redis-server", "ip"))):
        missing("network namespaces need root, and haproxy, redis-server and ip")
    config = tmp_path / "config"
    records = tmp_path / "run" / "biollm" / "records"
    for folder in (config, records, key := records.parent / "starts" / START):
        folder.mkdir(parents=True)
    provider = {"type": "api", "base_url": f"http://{HUB}:9000/v1", "models": ["small"], "env_key": "FIRST_KEY"}
    provider |= {"rate_limit": getattr(request, "param", "100000/min")}
    local = {"type": "local", "models": ["mine"], "priority": 90}
    whole = {
        "inherit": False, "providers": {"first": provider, "vllm": local}, "models": {"mine": {"hf_id": "lab/mine"}},
        "ledger": {"url": f"redis://{HUB}:6379/0"},
    }  # fmt: skip
    (config / "providers.yaml").write_text(yaml.safe_dump(whole))
    (config / "cluster.yaml").write_text(
        yaml.safe_dump({"cluster": {"name": "lab", "run_dir": str(tmp_path / "run"), "local_hosts": [HUB]}})
    )
    (records.parent / "nodes-lab.json").write_text(json.dumps({"node1": HUB}))
    (key / "key").write_text(SERVER_KEY)
    (key / "key").chmod(0o600)
    (tmp_path / "haproxy.cfg").write_text(HAPROXY)
    with Net(tmp_path) as net:
        net.start("hub", "redis-server", "--bind", HUB, "--protected-mode", "no", "--save", "", "--dir", str(tmp_path))
        served = net.start("hub", sys.executable, HERE / "provider_on.py", HUB, START, SERVER_KEY)
        assert served.stdout and served.stdout.readline() == "ready\n"
        for host in GATEWAYS:
            net.gateway(host)
        net.start("hub", "haproxy", "-f", tmp_path / "haproxy.cfg")
        until(lambda: net.get(f"http://{HUB}:8080/health")[0] == 200, 30)
        yield net


def lines(asking: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, _ = asking.communicate(timeout=120)
    return [json.loads(line) for line in out.splitlines()]


def gateways(net: Net) -> dict[str, subprocess.Popen[Any]]:
    return dict(zip(GATEWAYS, [each for each in net.processes if "serve" in each.args], strict=False))


@pytest.mark.parametrize("net", ["300/min"], indirect=True)
def test_a_gateway_that_is_killed_costs_only_the_requests_that_it_had(net: Net) -> None:
    asking = net.ask(clients=4, seconds=8, how="whole")
    time.sleep(2)
    gateways(net)["gw1"].kill()
    killed = time.time()
    found = lines(asking)
    assert max(each["s"] for each in found) < 20, "each ends within its deadline"
    broken = [each for each in found if each["outcome"] != "ok" and not each["outcome"].startswith("HTTP 429")]
    assert len(broken) <= 4, broken
    assert all(each["at"] < killed + 1 for each in broken), broken
    ok = sum(each["outcome"] == "ok" for each in found)
    assert any(each["outcome"] == "ok" and each["at"] > killed + 1 for each in found) or ok >= 290
    assert ok <= net.asked() <= 300, "the limit holds over both"
    if any(each["outcome"].startswith("HTTP 429") for each in found):
        assert net.asked() >= 296, "what the killed gateway had reserved counts"


def test_a_rolling_restart_loses_no_stream(net: Net) -> None:
    asking = net.ask(clients=50, seconds=16, how="stream")
    time.sleep(2)
    for host in GATEWAYS:
        old = gateways(net)[host]
        subprocess.run(["pkill", "-TERM", "-P", str(old.pid)], capture_output=True)
        old.send_signal(signal.SIGTERM)
        until(lambda host=host: net.get(f"http://{GATEWAYS[host]}:8000/health")[0] in (503, 0), 10)
        old.wait(60)
        net.processes.remove(old)
        net.processes.insert(0, net.gateway(host))
    found = lines(asking)
    assert [each["outcome"] for each in found if each["outcome"] != "ok"] == []
    assert len(found) >= 100
    assert net.asked() == len(found), "and none was sent twice"


def test_each_gateway_finds_a_server_by_its_record(net: Net) -> None:
    facts = {
        "start": START, "cluster": "lab", "job": "1", "submission": "s", "model": "mine", "host": "node1", "link": 1,
        "address": HUB, "port": 9000, "left_s": 3600,
    }  # fmt: skip
    file = net.root / "run" / "biollm" / "records" / f"{START}.json"
    file.write_text(json.dumps(facts))
    file.chmod(0o600)
    for address in GATEWAYS.values():
        until(lambda address=address: answers(net, f"http://{address}:8000/v1", "mine"), 20)


def answers(net: Net, url: str, model: str) -> bool:
    os.utime(net.root / "run" / "biollm" / "records" / f"{START}.json")
    program = (
        "import httpx, sys\n"
        "body = {'model': sys.argv[2], 'messages': [{'role': 'user', 'content': 'hi'}]}\n"
        f"headers = {{'Authorization': 'Bearer {KEY}'}}\n"
        "print(httpx.post(sys.argv[1] + '/chat/completions', json=body, headers=headers, timeout=20).status_code)"
    )
    words: Sequence[str] = ["ip", "netns", "exec", net.name("hub"), sys.executable, "-c", program, url, model]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() == "200"
