"""The ledger on a real Redis server: exact over hosts, and what happens while the server cannot be used."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from provider import Loopback, Server

pytest.importorskip("redis")
from redis_server import RedisServer, SlowProxy, free_port, required

from biollm._runtime import ledger as ledger_of
from biollm.client import get_model_client
from biollm.config import Limit, load_config
from biollm.config.schema import LedgerServer
from biollm.errors import install_command
from biollm.ledger import Claim, Ledger, Record, Refused
from biollm.ledger import redis as redis_ledger
from biollm.ledger.quotas import window
from biollm.monitoring import doctor

pytestmark = pytest.mark.real
SCOPE = "first/default"
SPAWN = multiprocessing.get_context("spawn")
Write = Callable[..., Path]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    required()
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def per(amount: float, unit: str, kind: str = "requests") -> Limit:
    return Limit(kind, amount, unit)  # type: ignore[arg-type]


def reserve(ledger: Ledger, *limits: Limit) -> int | Refused:
    return asyncio.run(ledger.reserve(Claim(SCOPE, limits)))


def record(request: str = "r", **more: Any) -> Record:
    return Record(time.time(), request, "first/small", "first", "default", "small", "ok", **more)


# --- Hosts ------------------------------------------------------------------------------------------------------------


def on_a_host(folder: Path, ahead: float, server: LedgerServer, out: Any) -> None:
    """Reserve as a process of a host whose clock is `ahead`, from tasks at once; put how many were granted."""
    real = time.time
    time.time = lambda: real() + ahead
    ledger = Ledger(folder, clock=time.time, server=server)

    async def burst() -> list[int | Refused]:
        limits = per(60, "min"), per(200, "day")
        return await asyncio.gather(*(ledger.reserve(Claim(SCOPE, limits)) for _ in range(40)))

    granted = [each for each in asyncio.run(burst()) if isinstance(each, int)]
    for reservation in granted:
        ledger.finish(reservation, SCOPE, record(prompt_tokens=10))
    ledger.close()
    out.put(len(granted))


@pytest.mark.slow
def test_a_limit_is_exact_over_eight_processes_on_four_hosts_with_clocks_of_their_own(
    tmp_path: Path, server: RedisServer
) -> None:
    out = SPAWN.Queue()
    hosts = [(tmp_path / f"host{number}", 3 * 3600.0 * number) for number in range(4)]
    children = [SPAWN.Process(target=on_a_host, args=(*host, server.server, out)) for host in hosts for _ in range(2)]
    for child in children:
        child.start()
    assert sum(out.get() for _ in children) == 60
    for child in children:
        child.join()
    day, month = per(200, "day", "tokens"), per(200, "month")
    with contextlib.closing(Ledger(tmp_path / "host0", server=server.server)) as ledger:
        assert [used for _, used, _ in ledger.used(SCOPE, [per(60, "min"), per(200, "day"), day])] == [60, 60, 600]
        assert ledger.used(SCOPE, [month]) != [], "a limit added later is counted from every host's history"


def test_a_server_that_lost_its_data_grants_at_most_one_limit_more(tmp_path: Path, server: RedisServer) -> None:
    hosts = [Ledger(tmp_path / name, server=server.server) for name in ("ann", "ben")]
    limits = per(20, "min"), per(30, "day")

    def granted() -> int:
        return sum(isinstance(reserve(hosts[number % 2], *limits), int) for number in range(60))

    assert granted() == 20
    server.call("FLUSHALL")
    server.call("SCRIPT", "FLUSH")
    for host in hosts:
        host.refresh()
    assert granted() == 20
    for host in hosts:
        host.close()


def test_every_key_has_the_prefix_and_ends_by_itself(tmp_path: Path, server: RedisServer) -> None:
    with contextlib.closing(Ledger(tmp_path, server=server.server)) as ledger:
        limits = per(5, "min"), per(1000, "min", "tokens"), per(5, "day"), per(9, "month", "usd")
        reservation = asyncio.run(ledger.reserve(Claim(SCOPE, limits, tokens=5, usd=0.1)))
        assert isinstance(reservation, int)
        ledger.finish(reservation, SCOPE, record(prompt_tokens=7))
        asyncio.run(ledger.reserve(Claim(SCOPE, limits, tokens=5, usd=0.1)))
        ledger.cool("account:a", 30, "429")
        ledger.learn_tokens("small", 10, 12)
        ledger.note_origins(["digest"], "small")
    keys = server.call("KEYS", "*")
    assert len(keys) == 10
    assert {key.partition(":")[0] for key in keys} == {"biollm"}
    assert all(0 < server.call("TTL", key) < 100 * 86400 for key in keys)


def test_counts_that_an_earlier_version_kept_in_another_layout_are_not_read(
    tmp_path: Path, server: RedisServer
) -> None:
    limit, at = per(1000, "min", "tokens"), time.time() - 100
    server.call("ZADD", f"biollm:sent:{SCOPE}", at, 1)
    server.call("HSET", f"biollm:tokens:{SCOPE}", 1, 1000)
    server.call("HSET", f"biollm:sums:{SCOPE}", f"tokens {window(limit):g}", f"1000 {at - 1}")
    with contextlib.closing(Ledger(tmp_path, server=server.server)) as ledger:
        assert isinstance(reserve(ledger, limit), int)
        assert [used for _, used, _ in ledger.used(SCOPE, [limit])] == [0]


def test_a_connection_that_the_server_closed_is_opened_again(
    tmp_path: Path, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Ledger(tmp_path, server=server.server)) as ledger:
        for used in (1, 2):
            assert isinstance(reserve(ledger, per(5, "min")), int)
            assert ledger.used(SCOPE, [per(5, "min")])[0][1] == used
            server.call("CLIENT", "KILL", "TYPE", "normal")
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("limit", "used"), [(per(1, "min"), 1), (per(1000, "min", "tokens"), 800)], ids=["requests", "tokens"]
)
def test_a_request_is_counted_once_where_the_connection_breaks_before_the_answer(
    tmp_path: Path, server: RedisServer, limit: Limit, used: float
) -> None:
    with contextlib.closing(SlowProxy(server.port, 0.0)) as proxy:
        address = LedgerServer(url=f"redis://127.0.0.1:{proxy.port}/0")
        with contextlib.closing(Ledger(tmp_path, server=address)) as ledger:
            asyncio.run(ledger.reserve(Claim("another", (limit,))))  # the server has the script
            proxy.lose = 1
            assert isinstance(asyncio.run(ledger.reserve(Claim(SCOPE, (limit,), tokens=800))), int)
            assert proxy.lose == 0
            assert [each[1] for each in ledger.used(SCOPE, [limit])] == [used]
            assert isinstance(asyncio.run(ledger.reserve(Claim(SCOPE, (limit,), tokens=800))), Refused)


def test_a_caller_that_is_cancelled_leaves_nothing_counted_where_its_loop_ends_before_the_answer(
    tmp_path: Path, server: RedisServer
) -> None:
    """As at interpreter exit."""
    limit = per(9, "min")
    with (
        contextlib.closing(SlowProxy(server.port, 0.0)) as proxy,
        contextlib.closing(Ledger(tmp_path / "other", server=server.server)) as other,
    ):
        ledger = Ledger(tmp_path, server=LedgerServer(url=f"redis://127.0.0.1:{proxy.port}/0"))
        asyncio.run(ledger.reserve(Claim("another", (limit,))))  # the server has the script
        proxy.delay = 0.1

        async def leave() -> None:
            asking = asyncio.ensure_future(ledger.reserve(Claim(SCOPE, (limit,))))
            await asyncio.sleep(0)  # the job is handed in
            until(lambda: other.used(SCOPE, [limit])[0][1] == 1)
            asking.cancel()

        asyncio.run(leave())
        ledger.close()
        assert other.used(SCOPE, [limit])[0][1] == 0


# --- Faults: completions go on, limits hold in the process, one warning says so ---------------------------------------


@contextlib.contextmanager
def paused(server: RedisServer) -> Iterator[None]:
    server.pause(True)
    yield
    server.pause(False)


@contextlib.contextmanager
def gone(server: RedisServer) -> Iterator[None]:
    server.stop()
    yield
    server.start()


@contextlib.contextmanager
def read_only(server: RedisServer) -> Iterator[None]:
    server.call("REPLICAOF", "127.0.0.1", "1")
    yield
    server.call("REPLICAOF", "NO", "ONE")


@contextlib.contextmanager
def out_of_memory(server: RedisServer) -> Iterator[None]:
    server.call("CONFIG", "SET", "maxmemory", "1")
    yield
    server.call("CONFIG", "SET", "maxmemory", "0")


FAULTS = [paused, gone, read_only, out_of_memory]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage() for each in caplog.records if each.levelno == logging.WARNING and "ledger" in each.message
    ]


def shared(net: Loopback, waterfall: Write, port: int, **first: Any) -> tuple[Server, Server]:
    """Write a waterfall of two, with 4 requests a minute for the first, whose ledger is on the port."""
    one, other = net.serve(), net.serve()
    ledger = {"ledger": {"url": f"redis://127.0.0.1:{port}/0"}}
    waterfall(ledger, first={"base_url": one.url, "rate_limit": "4/min", **first}, second=other)
    return one, other


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_completions_go_on_while_the_server_cannot_be_used(
    net: Loopback, waterfall: Write, server: RedisServer, fault: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = shared(net, waterfall, server.port)
    client = get_model_client()
    assert client.complete("hi").provider == "first"
    ledger_of(client.config).flush()
    began = time.monotonic()
    with fault(server):
        providers = [client.complete("hi").provider for _ in range(7)]
        time.sleep(max(0.0, 2 - (time.monotonic() - began)))
    kept = 4 if fault is not out_of_memory else providers.count("first")  # Redis then takes what also frees memory
    assert providers == ["first"] * kept + ["second"] * (7 - kept), "this process keeps the limit by its own count"
    assert kept in (3, 4)
    assert len(first.completions) + len(second.completions) == 8, "nothing is sent twice"
    (warning,) = warnings(caplog)
    assert f"127.0.0.1:{server.port}" in warning
    assert "`biollm doctor` checks it" in warning


@pytest.mark.slow
@pytest.mark.parametrize("fault", [paused, gone])
def test_what_was_counted_meanwhile_is_counted_on_the_server_afterwards(
    net: Loopback, waterfall: Write, server: RedisServer, fault: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    shared(net, waterfall, server.port, rate_limit=["6/min", "1000/day"])
    client = get_model_client()
    client.complete("hi")
    with fault(server):
        for _ in range(3):
            client.complete("hi")
    time.sleep(5.2)  # until the server is used again
    client.complete("hi")
    ledger = ledger_of(client.config)
    ledger.flush()
    minute, day = (used for _, used, _ in ledger.used(SCOPE, client.config.providers[0].accounts[0].limits))
    if fault is paused:
        assert (minute, day) == (5, 5), "nothing is lost, and nothing counted twice"
    else:
        assert minute == 4, "the windows of a server that lost its data start anew: up to one limit more"
        assert 5 <= day <= 8, "a day is taken from the history; what was counted meanwhile may count twice"
    assert len(warnings(caplog)) == 1


def test_a_server_that_lost_its_data_gets_days_and_months_from_the_history_of_every_user(
    tmp_path: Path, server: RedisServer
) -> None:
    limits = per(100, "day"), per(1000, "month", "tokens")
    users = [Ledger(tmp_path / name, server=server.server) for name in ("ann", "ben")]
    for user, tokens in zip(users, (10, 20), strict=True):
        reservation = reserve(user, *limits)
        assert isinstance(reservation, int)
        user.finish(reservation, SCOPE, record(prompt_tokens=tokens))
        user.flush()
    server.stop()
    server.start()
    for user in users:
        reserve(user, *limits)
    assert [used for _, used, _ in users[0].used(SCOPE, limits)] == [4, 30]
    for user in users:
        user.close()


@pytest.mark.slow
@pytest.mark.parametrize(("delay", "kept"), [(0.2, 4), (0.4, 5)], ids=["200 ms", "400 ms"])
def test_completions_go_on_over_a_slow_network(
    net: Loopback, waterfall: Write, server: RedisServer, delay: float, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(SlowProxy(server.port, 0.0)) as proxy:
        first, second = shared(net, waterfall, proxy.port)
        client = get_model_client()
        client.complete("hi")
        proxy.delay = delay
        waited: list[float] = []
        for _ in range(7):
            began = time.monotonic()
            client.complete("hi")
            waited.append(time.monotonic() - began)
        ledger_of(client.config).flush()  # while the proxy is there: a later warning would be another test's
    assert len(first.completions) == kept, "a server that answers within 250 ms keeps the limit"
    assert len(first.completions) + len(second.completions) == 8
    assert max(waited) < 1.5
    assert len(warnings(caplog)) == (delay > 0.25)


# --- Configuration ----------------------------------------------------------------------------------------------------


def with_password(server: RedisServer, folder: Path, mode: int = 0o600, secret: str = "correct-horse-battery") -> Path:
    server.call("CONFIG", "SET", "requirepass", "correct-horse-battery")
    file = folder / "redis.password"
    file.write_text(f"{secret}\n")
    file.chmod(mode)
    return file


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("file", ""),
        ("environment", ""),
        ("none", "Authentication required"),
        ("wrong", "invalid"),
        ("open", "is open to others: chmod 600"),
        ("missing", "does not exist: write it, or correct password_file"),
        ("unset", "REDIS_PASSWORD, which holds its password, is not set"),
    ],
)
def test_the_password_comes_from_a_private_file_or_the_environment(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    given: str, found: str,
) -> None:  # fmt: skip
    file = with_password(
        server,
        tmp_path,
        0o644 if given == "open" else 0o600,
        "a-wrong-one" if given == "wrong" else "correct-horse-battery",
    )
    if given == "environment":
        monkeypatch.setenv("REDIS_PASSWORD", "correct-horse-battery")
    where = {"none": {}, "environment": {"password_env": "REDIS_PASSWORD"}, "unset": {"password_env": "REDIS_PASSWORD"}}
    if given == "missing":
        file.unlink()
    settings = LedgerServer(url=server.server.url, **where.get(given, {"password_file": file}))
    with contextlib.closing(Ledger(tmp_path, server=settings)) as ledger:
        assert isinstance(reserve(ledger, per(5, "min")), int)
    assert [found.lower() in each.lower() for each in caplog.messages] == ([True] if found else [])
    assert "horse" not in caplog.text + repr(settings)


def test_it_is_reached_through_a_unix_socket(tmp_path: Path) -> None:
    required()
    path = tmp_path / "s"
    server = RedisServer(tmp_path, "--unixsocket", str(path))
    try:
        with contextlib.closing(Ledger(tmp_path, server=LedgerServer(url=f"unix://{path}?db=1"))) as ledger:
            assert isinstance(reserve(ledger, per(5, "min")), int)
        assert server.call("INFO", "keyspace")["db1"]["keys"] == 1
    finally:
        server.stop()


def test_it_is_reached_over_tls(tmp_path: Path) -> None:
    required()
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*made, *names], check=True, capture_output=True)
    server = RedisServer(tmp_path)
    tls = server.port + 1 if server.port < 65535 else server.port - 1
    options = {"tls-cert-file": certificate, "tls-key-file": key, "tls-auth-clients": "no", "tls-port": tls}
    try:
        server.call("CONFIG", "SET", *(str(each) for pair in options.items() for each in pair))
        address = f"rediss://127.0.0.1:{tls}/0"
        with contextlib.closing(
            Ledger(tmp_path / "a", server=LedgerServer(url=f"{address}?ssl_ca_certs={certificate}"))
        ) as ledger:
            assert isinstance(reserve(ledger, per(5, "min")), int)
        assert server.call("KEYS", "*") == ["biollm:2:sent:first/default"]
        stranger = Ledger(tmp_path / "b", server=LedgerServer(url=address))
        reserve(stranger, per(5, "min"))
        assert stranger._availability.failed_at is not None, "an unknown certificate is not trusted"
        stranger.close()
    finally:
        server.stop()


LACKING = """
import sys
sys.modules["redis"] = None
from biollm.cli import main
main()
"""


def test_without_the_client_the_error_names_the_extra(net: Loopback, waterfall: Write) -> None:
    shared(net, waterfall, 1)
    done = subprocess.run(
        [sys.executable, "-c", LACKING, "complete", "hi"],
        capture_output=True,
        text=True,
        env=os.environ | {"LITELLM": ""},
    )
    assert done.returncode != 0
    assert install_command("redis") in done.stderr
    assert "Traceback" not in done.stderr


# --- What shows it ----------------------------------------------------------------------------------------------------


def checked() -> doctor.Check:
    return next(each for each in doctor.check(load_config()) if each.name == "ledger")


def test_doctor_reports_the_server(net: Loopback, waterfall: Write, server: RedisServer) -> None:
    shared(net, waterfall, server.port)
    assert checked().ok
    assert f"redis://127.0.0.1:{server.port}/0: {server.product} " in checked().detail
    assert " ms, its clock is " in checked().detail


@pytest.mark.parametrize(
    ("command", "found", "fix"),
    [
        ("CONFIG SET maxmemory 100mb maxmemory-policy allkeys-lru", "forgets counts", "maxmemory-policy noeviction"),
        ("REPLICAOF 127.0.0.1 1", "is a read-only replica", "the primary's address"),
        ("CONFIG SET requirepass secret", "cannot be used: Authentication required", "correct `ledger:`"),
        ("SHUTDOWN NOSAVE", "Connection refused", "Start it"),
    ],
)
def test_doctor_suggests_a_fix(
    net: Loopback, waterfall: Write, server: RedisServer, command: str, found: str, fix: str
) -> None:
    shared(net, waterfall, server.port)
    with contextlib.suppress(Exception):
        server.call(*command.split())
    assert not checked().ok
    assert found in checked().detail
    assert fix in checked().fix


def test_doctor_refuses_a_node_of_a_cluster(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    required()
    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        shared(net, waterfall, server.port)
        assert not checked().ok
        assert "is a node of a Redis cluster" in checked().detail
    finally:
        server.stop()


def test_commands_read_the_live_limits_of_the_server(
    net: Loopback, waterfall: Write, server: RedisServer, biollm: Callable[..., Any], tmp_path: Path
) -> None:
    shared(net, waterfall, server.port)
    with contextlib.closing(Ledger(tmp_path / "another-host", server=server.server)) as other:
        limit = load_config().provider("first").accounts[0].limits[0]
        for _ in range(4):
            assert isinstance(reserve(other, limit), int)
        other.cool("account:second/default", 50, "HTTP 429: slow down")
    quota = next(each for each in biollm("usage", "--json").json["quotas"] if each["limit"] == "4/min")
    assert quota["used"] == 4
    reasons = {each["deployment"]: each["reason"] for each in biollm("explain", "hi", "--json").json}
    assert "4/min is used up" in reasons["first/small"]
    assert "HTTP 429: slow down" in reasons["second/small"]
    assert "biollm_quota_used{" in biollm("usage", "--prometheus").out


def test_the_rights_that_the_documentation_names_are_enough(tmp_path: Path, server: RedisServer) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    command = page.partition("| access | `")[2].partition("`")[0].replace("PASSWORD", "correct-horse-battery")
    server.call(*command.split())
    (file := tmp_path / "password").write_text("correct-horse-battery")
    file.chmod(0o600)
    settings = LedgerServer(url=f"redis://biollm@127.0.0.1:{server.port}/0", password_file=file)
    with contextlib.closing(Ledger(tmp_path, server=settings)) as ledger:
        assert isinstance(reserve(ledger, per(5, "min")), int)
        ledger.cool("account:a", 30, "429")
        ledger.flush()
        assert ledger._availability.failed_at is None
    assert redis_ledger.examine(settings).product.startswith(server.product)
