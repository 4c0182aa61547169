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
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from behaviours import EMPTY, OK, Behaviour
from conftest import Ran
from provider import Loopback, Server
from test_supervisor import Job, listens

from biollm._runtime import background, watch
from biollm.client import Client, CompletionError, get_model_client
from biollm.config import load_config
from biollm.config.paths import run_dir
from biollm.errors import UnavailableError
from biollm.providers import copilot
from biollm.providers.credentials import Credential
from biollm.routing.deployments import build_deployments
from biollm.routing.health import check
from biollm.routing.host_check import TRUSTED, trust
from biollm.routing.litellm_private import OWN_HANDLER
from biollm.slurm.endpoints import START, Endpoint, ask

Write = Callable[..., Path]
Biollm = Callable[..., Ran]


@dataclass
class Ear:
    """A listener that keeps every byte that it is sent.

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
def hearing(listener: socket.socket, answer: bytes = b"") -> Iterator[Ear]:
    """Take what connects to a listener, on a thread of its own, and answer each request so."""
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
                        line.sendall(answer)

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hosts", "policy", "key", "sent"),
    [
        ("127.0.0.1", [], "local_only", True, True),
        ("0.0.0.0", ["0.0.0.0"], "local_only", True, True),
        ("0.0.0.0", [], "any", False, False),
        ("0.0.0.0", ["0.0.0.0"], "any", False, True),
        ("0.0.0.0", [], "any", True, False),
    ],
)
def test_a_gateway_is_used_over_plain_http_on_local_hosts_alone(
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
    said = "nothing is sent over plain http:// to 0.0.0.0: use https://, or name 0.0.0.0 in local_hosts of cluster.yaml"
    answer = client.complete("hi")
    assert (answer.text, answer.attempts[0].reason) == ("from fine", said)
    assert client.explain()[0].reason == said
    health = {each.provider: each for each in check(load_config())}
    assert (health["clear"].available, health["clear"].error, health["fine"].available) == (False, said, True)
    assert biollm("drill", "--live", "--json").json["absent"] == {"clear/small": said}
    with pytest.raises(CompletionError, match="local_hosts"):
        client.complete("hi", provider="clear")
    assert open_wire.heard == []


def test_no_prompt_goes_over_plain_http_to_a_remote_host_without_a_key(
    ear: Ear, net: Loopback, waterfall: Write, biollm: Biollm
) -> None:
    models = {"models": {"own": {"type": "local", "hf_id": "x/own"}}}
    clear = {"type": "local", "base_url": f"{ear.elsewhere}/v1", "models": ["own"]}
    waterfall(models, clear=clear, fine=net.serve(text="from fine"))
    answer = Client().complete("secret")
    assert (answer.text, answer.attempts[0].reason[:34]) == ("from fine", "nothing is sent over plain http://")
    assert "providers.clear.base_url: is never used" in biollm("config", "--check").err
    assert ear.heard == []


def test_config_check_says_in_which_line(open_wire: Ear, biollm: Biollm) -> None:
    ran = biollm("config", "--check")
    assert ran.code == 0
    (line,) = [line for line in ran.err.splitlines() if "local_hosts" in line]
    where, _, _ = line.partition(": providers.clear.base_url: is never used: nothing is sent over plain http://")
    file, _, number = where.removeprefix("warning: ").rpartition(":")
    assert open_wire.elsewhere in Path(file).read_text().splitlines()[int(number) - 1]


def test_a_host_of_the_site_gets_its_key_over_plain_http(ear: Ear, waterfall: Write, biollm: Biollm) -> None:
    folder = waterfall(clear=f"{ear.elsewhere}/v1")
    (folder / "cluster.yaml").write_text("cluster: {local_hosts: [0.0.0.0]}\n")
    assert "local_hosts" not in biollm("config", "--check").err
    with pytest.raises(CompletionError):
        Client(timeout=1).complete("hi")
    assert any(b"sk-planted-clear" in heard for heard in ear.heard)


def test_no_login_of_copilot_goes_over_plain_http_to_a_remote_host(
    ear: Ear, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DEVICE_CODE_URL", "ACCESS_TOKEN_URL", "API_KEY_URL"):
        monkeypatch.setenv(f"GITHUB_COPILOT_{name}", f"{ear.elsewhere}/{name}")
    folder = state / "github_copilot" / "lab"
    folder.mkdir(parents=True)
    (folder / "access-token").write_text("ghu-planted")
    assert (
        copilot.token("lab", state)
        == f"no login is sent over plain http:// to {ear.elsewhere}/API_KEY_URL: write https://"
    )
    with pytest.raises(UnavailableError, match="no login is sent over plain http://"):
        copilot.login("lab", state, show=print)
    assert ear.heard == []


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


@pytest.mark.slow
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
        **({"free_tier": True, "trains_on_prompts": False} if kind == "api" else {}),  # else its price is unknown
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
    check(load_config())
    assert others.heard[-1].startswith(b"GET /v1/models")


@pytest.mark.slow
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
    (deployment,) = build_deployments(client.config)

    async def ask(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            assert await trust().objection(deployment, Credential("sk-planted"), client.config.cluster) is None
        return (time.perf_counter() - began) / times

    assert background().run(ask(1000)) < 1e-3


# --- Servers found by their records ------------------------------------------------------------------------------

KEY = "the-key-of-the-start-0123456789"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A server that was started as by Slurm."""
    job = Job(tmp_path)
    job.start("")
    yield job
    job.stop()


@pytest.fixture
def found(job: Job, waterfall: Write, net: Loopback) -> dict[str, Any]:
    """Configure a first rung that is found by its record, and one that answers after it; return the record."""
    record = job.record()
    folder = waterfall(vllm={"type": "local", "models": ["m0"]}, fine=net.serve(text="from fine"))
    (folder / "models.yaml").write_text("inherit: false\nmodels:\n  m0: {hf_id: a/b}\n")
    (folder / "cluster.yaml").write_text(f"cluster: {{name: lab, run_dir: {job.run.parent}}}\n")
    return record


def dies(job: Job, record: dict[str, Any]) -> None:
    """Kill supervisor and server, as the node's loss of power does: record and key stay."""
    job.stop()
    while listens(record["port"]):
        time.sleep(0.01)


IMPOSTOR = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n"
SAYS = {
    "no start": f"{IMPOSTOR}\r\n",
    "the start, which is no secret": f"{IMPOSTOR}x-biollm-start: START\r\n\r\n",
    "a wrong proof": f"{IMPOSTOR}x-biollm-start: START\r\nx-biollm-proof: {'0' * 64}\r\n\r\n",
    "odd letters": f"{IMPOSTOR}x-biollm-start: START\r\nx-biollm-proof: \xe9\r\n\r\n",
    "a proof that it has seen": f"{IMPOSTOR}x-biollm-start: START\r\nx-biollm-proof: SEEN\r\n\r\n",
    "nothing": "",  # at the end: the server then rests
}


@pytest.mark.slow
def test_who_takes_the_port_of_a_server_that_died_learns_neither_key_nor_prompt(
    job: Job, found: dict[str, Any], subtests: pytest.Subtests
) -> None:
    client, key = get_model_client(timeout=2.0), job.key(found)
    (endpoint,) = watch(client.config.cluster).refresh()
    assert client.complete("SECRET").provider == "vllm"
    with urlopen(f"http://127.0.0.1:{found['port']}/health?nonce={'0' * 32}") as answer:
        seen = answer.headers["x-biollm-proof"] or ""
    dies(job, found)
    time.sleep(TRUSTED)
    restart = "another program, or one of an older biollm (biollm down m0 && biollm up m0)"
    for says, text in SAYS.items():
        told = text.replace("START", found["start"]).replace("SEEN", seen).encode("latin-1")
        listener = socket.create_server(("127.0.0.1", found["port"]))
        with subtests.test(says), listener, hearing(listener, told) as ear:
            answers = [client.complete("SECRET"), *(list(client.stream("SECRET"))[-1].completion for _ in range(2))]
            assert [str(answer) for answer in answers] == ["from fine"] * 3
            (health, _) = check(client.config, timeout=1.0)
            assert health.available is False
            with pytest.raises(OSError):
                ask(endpoint, "GET", "/metrics", timeout=1)
            heard = b"".join(ear.heard)
            assert heard, "it was not even asked to prove its start"
            assert not any(secret in heard for secret in (b"SECRET", key.encode(), b"uthorization"))
            if says != "nothing":
                why = answers[0].attempts[0].reason
                assert why.endswith(f"does not prove to be its server: {restart}")
                assert health.error == why


@pytest.mark.slow
def test_a_server_that_is_found_answers_in_every_way(job: Job, found: dict[str, Any]) -> None:
    client = get_model_client()
    assert [client.complete("hi").text for _ in range(3)] == ["hi"] * 3
    assert client.complete("hi", provider="vllm", max_retries=1).deployment == f"vllm/m0#{found['start'][:8]}"
    assert check(client.config)[0].available
    (endpoint,) = watch(client.config.cluster).refresh()
    assert ask(endpoint, "GET", "/v1/models", timeout=5)[0] == 200


@pytest.fixture
def running(net: Loopback, waterfall: Write, tmp_path: Path) -> Server:
    """A server that a record names, and one that answers after it."""
    server = net.serve(text="from the server")
    server.start_id, server.key = "ab" * 16, KEY
    (tmp_path / "key").write_text(KEY)
    models = {"mine": {"type": "local", "hf_id": "lab/mine"}}
    waterfall({"models": models}, vllm={"type": "local", "models": ["mine"]}, fine=net.serve(text="from fine"))
    endpoint = Endpoint(
        start=server.start_id, job="1", submission="t", model="mine", host="localhost", base_url=server.url,
        key_file=tmp_path / "key", owner=os.getuid(), left_s=3600.0, link=1,
    )  # fmt: skip
    cluster = load_config().cluster
    background().kept["watch", run_dir(cluster), cluster.trusted_owners] = SimpleNamespace(
        alive=lambda: (endpoint,), latest=lambda: (endpoint,), awake=True, settle=lambda _: True
    )
    return server


@pytest.mark.parametrize("own", ["", "True"], ids=["OpenAI's SDK", "LiteLLM's own handler"])
@pytest.mark.parametrize("named", ["", "cd" * 16], ids=["no start", "another start"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_does_not_name_the_start_is_no_answer(
    running: Server, monkeypatch: pytest.MonkeyPatch, stream: bool, named: str, own: str
) -> None:
    monkeypatch.setenv(OWN_HANDLER, own)
    client = get_model_client()

    def ask() -> Any:
        return list(client.stream("hi"))[-1].completion if stream else client.complete("hi")

    assert ask().text == "from the server"
    running.behaviour = Behaviour(headers=((START, named),))
    answer = ask()
    assert (answer.text, answer.attempts[0].outcome) == ("from fine", "failed")
    assert (
        answer.attempts[0].reason == "another program uses the server's port: the response lacks the server's start id"
    )
    assert client.explain()[0].reason.startswith(answer.attempts[0].reason), "it rests"


@pytest.mark.slow
def test_a_plain_text_completion_relies_on_the_proof(running: Server) -> None:
    """LiteLLM keeps no headers of its answer."""
    assert get_model_client().fill_in_middle("def f(", None).text == "from the server"
    running.start_id = "cd" * 16
    time.sleep(TRUSTED)
    with pytest.raises(CompletionError, match="does not prove to be its server"):
        get_model_client().fill_in_middle("def f(", None)


@pytest.mark.slow
def test_a_proof_serves_many_requests_and_one_is_asked_for_at_a_time(running: Server) -> None:
    client = get_model_client()
    client.complete("hi")

    async def many() -> None:
        await asyncio.gather(*(client.acomplete("hi") for _ in range(20)))

    asyncio.run(many())
    assert (len(running.completions), running.proofs) == (21, 1)
    time.sleep(TRUSTED)
    asyncio.run(many())
    assert (len(running.completions), running.proofs) == (41, 2)


def test_after_a_failure_without_a_status_the_server_proves_its_start_anew(running: Server) -> None:
    client = get_model_client()
    client.complete("hi")
    running.behaviour = EMPTY
    client.complete("hi")
    running.behaviour = OK
    client.complete("hi")
    assert running.proofs == 2
