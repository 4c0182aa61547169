"""What may not leave is never sent: who gets a key or a prompt, and who not even a connection."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from provider import Loopback

from biollm._background import background
from biollm._reach import TRUSTED, trust
from biollm.client import Client, CompletionError, get_model_client
from biollm.config import load_config
from biollm.credentials import of_secret
from biollm.errors import UnavailableError
from biollm.health import check
from biollm.routing import deployments

Write = Callable[..., Path]
Biollm = Callable[..., Ran]


@dataclass
class Ear:
    """A listener that keeps every byte that it is sent, and answers nothing.

    Attributes:
        port: On every loopback address.
        heard: What each connection sent.
    """

    port: int
    heard: list[bytes] = field(default_factory=list[bytes])

    @property
    def elsewhere(self) -> str:
        """Return its URL under a name that leads here, but that no rule calls local."""
        return f"http://0.0.0.0:{self.port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def hearing(listener: socket.socket) -> Iterator[Ear]:
    """Take what connects to a listener, on a thread of its own."""
    ear = Ear(listener.getsockname()[1])

    def serve() -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            ear.heard.append(b"")
            with line:
                line.settimeout(0.5)
                with suppress(OSError):
                    while more := line.recv(65536):
                        ear.heard[-1] += more

    threading.Thread(target=serve, daemon=True).start()
    yield ear
    listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def ear() -> Iterator[Ear]:
    with socket.create_server(("127.0.0.1", 0)) as listener, hearing(listener) as ear:
        yield ear


def test_the_ear_hears_under_the_other_name(ear: Ear) -> None:
    with socket.create_connection(("0.0.0.0", ear.port)) as line:
        line.sendall(b"hello")
    while ear.heard != [b"hello"]:
        pass


# --- The gateway that BIOLLM_GATEWAY names -----------------------------------------------------------------------


def _configured(folder: Path) -> None:
    (folder / "models.yaml").write_text("data_policy: local_only\n")


LOCAL_ONLY: dict[str, Callable[[pytest.MonkeyPatch, Path], dict[str, Any]]] = {
    "the option": lambda patch, folder: {"local_only": True},
    "the data policy of the call": lambda patch, folder: {"data_policy": "local_only"},
    "the environment": lambda patch, folder: patch.setenv("BIOLLM_LOCAL_ONLY", "1") or {},
    "the configuration": lambda patch, folder: _configured(folder) or {},
}


@pytest.mark.parametrize("said", LOCAL_ONLY)
def test_under_local_only_a_remote_gateway_gets_no_connection(
    ear: Ear, net: Loopback, waterfall: Write, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    folder = waterfall(first=net.serve())
    monkeypatch.setenv("BIOLLM_GATEWAY", ear.elsewhere)
    options = LOCAL_ONLY[said](monkeypatch, folder)
    client = get_model_client()
    ways: list[Callable[[], Any]] = [
        lambda: client.complete("secret", **options),
        lambda: list(client.stream("secret", **options)),
        lambda: asyncio.run(client.acomplete("secret", **options)),
    ]
    for way in ways:
        with pytest.raises(UnavailableError, match=r"the data policy is local_only.*0\.0\.0\.0.*local_hosts"):
            way()
    assert ear.heard == []


def test_the_command_line_sends_a_remote_gateway_nothing_either(
    ear: Ear, net: Loopback, waterfall: Write, monkeypatch: pytest.MonkeyPatch, biollm: Biollm
) -> None:
    waterfall(first=net.serve())
    monkeypatch.setenv("BIOLLM_GATEWAY", ear.elsewhere)
    for more in ((), ("--stream",)):
        ran = biollm("complete", "secret", "--local-only", *more)
        assert (ran.code, "local_hosts" in ran.err) == (69, True), ran.err
    assert ear.heard == []


@pytest.mark.parametrize(
    ("name", "hosts", "policy", "key", "sent"),
    [
        ("127.0.0.1", [], "local_only", True, True),
        ("0.0.0.0", ["0.0.0.0"], "local_only", True, True),
        ("0.0.0.0", [], "any", False, True),
        ("0.0.0.0", [], "any", True, False),
    ],
)
def test_a_gateways_key_goes_over_plain_http_to_local_hosts_alone(
    ear: Ear, net: Loopback, waterfall: Write, monkeypatch: pytest.MonkeyPatch,
    name: str, hosts: list[str], policy: str, key: bool, sent: bool,
) -> None:  # fmt: skip
    folder = waterfall(first=net.serve())
    (folder / "cluster.yaml").write_text(f"cluster: {{local_hosts: {hosts}}}\n")
    monkeypatch.setenv("BIOLLM_GATEWAY", f"http://{name}:{ear.port}/v1")
    if key:
        monkeypatch.setenv("BIOLLM_GATEWAY_KEY", "a-key-of-this-test")
    with pytest.raises(CompletionError if sent else UnavailableError, match="broke off" if sent else "local_hosts"):
        get_model_client().complete("hi", data_policy=policy)
    assert [b"a-key-of-this-test" in heard for heard in ear.heard] == ([key] if sent else [])


# --- A provider's base_url ---------------------------------------------------------------------------------------


@pytest.fixture
def open_wire(ear: Ear, net: Loopback, waterfall: Write) -> Ear:
    """A first provider whose key would go over plain http to a host that is not this site's, and one that answers."""
    waterfall(clear=f"{ear.elsewhere}/v1", fine=net.serve(text="from fine"))
    return ear


def test_no_key_of_a_provider_goes_over_plain_http_to_a_remote_host(open_wire: Ear, biollm: Biollm) -> None:
    client = Client()
    said = "no key is sent over plain http:// to 0.0.0.0: use https://, or name 0.0.0.0 in local_hosts of cluster.yaml"
    answer = client.complete("hi")
    assert (answer.text, answer.attempts[0].reason) == ("from fine", said)
    assert client.explain()[0].reason == said
    health = {each.provider: each for each in check(load_config())}
    assert (health["clear"].available, health["clear"].error, health["fine"].available) == (False, said, True)
    assert biollm("drill", "--live", "--json").json["absent"] == {"clear/small": said}
    with pytest.raises(CompletionError, match="local_hosts"):
        client.complete("hi", provider="clear")
    assert open_wire.heard == []


def test_config_check_says_in_which_line(open_wire: Ear, biollm: Biollm) -> None:
    ran = biollm("config", "--check")
    assert ran.code == 0
    (line,) = [line for line in ran.err.splitlines() if "local_hosts" in line]
    where, _, _ = line.partition(": providers.clear.base_url: is never asked: no key is sent over plain http://")
    file, _, number = where.removeprefix("warning: ").rpartition(":")
    assert open_wire.elsewhere in Path(file).read_text().splitlines()[int(number) - 1]


def test_a_host_of_the_site_gets_its_key_over_plain_http(ear: Ear, waterfall: Write, biollm: Biollm) -> None:
    folder = waterfall(clear=f"{ear.elsewhere}/v1")
    (folder / "cluster.yaml").write_text("cluster: {local_hosts: [0.0.0.0]}\n")
    assert "local_hosts" not in biollm("config", "--check").err
    with pytest.raises(CompletionError):
        Client(timeout=0.3).complete("hi")
    assert any(b"sk-planted-clear" in heard for heard in ear.heard)


# --- Whose listener it is ----------------------------------------------------------------------------------------


@pytest.fixture
def others() -> Iterator[Ear]:
    """A listener of another user's."""
    os.seteuid(65534)
    try:
        listener = socket.create_server(("127.0.0.1", 0))
    finally:
        os.seteuid(0)
    with listener, hearing(listener) as ear:
        yield ear


@pytest.mark.skipif(os.getuid() != 0, reason="only root can listen as somebody else")
@pytest.mark.parametrize(("kind", "key"), [("api", True), ("local", True), ("local", False)])
def test_another_users_listener_on_loopback_gets_no_byte_whatever_the_type(
    others: Ear, net: Loopback, waterfall: Write, biollm: Biollm, monkeypatch: pytest.MonkeyPatch, kind: str, key: bool
) -> None:
    monkeypatch.setenv("THEIR_KEY", "sk-planted-their-0123456789")
    entry = {
        "type": kind,
        "base_url": f"{others.url}/v1",
        "models": ["small"],
        **({"env_key": "THEIR_KEY"} if key else {}),
    }
    models = {"models": {"small": {"type": "local", "hf_id": "lab/small"}}} if kind == "local" else {}
    folder = waterfall(models, theirs=entry, fine=net.serve(text="from fine"))
    answer = get_model_client().complete("hi", local_only=True)
    said = f"what listens at {others.url}/v1 belongs to another user (trusted_owners in cluster.yaml)"
    assert (answer.text, answer.attempts[0].reason) == ("from fine", said)
    assert "".join(map(str, get_model_client().stream("hi"))) == "from fine"
    health = {each.provider: each for each in check(load_config())}
    assert (health["theirs"].available, health["theirs"].error) == (False, said)
    live = biollm("drill", "--live", "--json").json["answers"][0]
    assert (live["state"], live["why"]) == ("not asked", said)
    assert "".join(map(bytes.decode, others.heard)) == ""
    (folder / "cluster.yaml").write_text("cluster: {trusted_owners: ['65534']}\n")
    check(load_config(), timeout=0.5)
    assert others.heard[-1].startswith(b"GET /v1/models")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can listen as somebody else")
def test_a_listener_is_looked_up_again_after_five_seconds(net: Loopback, waterfall: Write) -> None:
    """The window in which another user's listener could take the place of one that ended, and be sent a request."""
    server = net.serve()
    waterfall(first=server, last=net.serve(text="from last"))
    client = get_model_client()
    client.complete("hi")
    net.stop(server)
    os.seteuid(65534)
    try:
        listener = socket.create_server(("127.0.0.1", int(server.url.split(":")[2].removesuffix("/v1"))))
    finally:
        os.seteuid(0)
    with listener, hearing(listener) as ear:
        time.sleep(TRUSTED)
        assert client.complete("hi").text == "from last"
        assert "".join(map(bytes.decode, ear.heard)) == ""


def test_what_was_looked_up_a_moment_ago_costs_microseconds(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve())
    client = get_model_client()
    client.complete("hi")
    (deployment,) = deployments(client.config)

    async def ask(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            assert await trust().objection(deployment, of_secret("sk-planted"), client.config.cluster) is None
        return (time.perf_counter() - began) / times

    assert background().run(ask(1000)) < 1e-3
