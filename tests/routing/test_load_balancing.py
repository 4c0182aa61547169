"""Replicas of a rung, on real servers: who is asked when several may be, and what was looked at to decide it."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from behaviours import HANG, HTTP_429, HTTP_500, OK, Behaviour, limited
from provider import Loopback, Request, Server

from biollm._runtime import background
from biollm.client import Client, get_model_client
from biollm.config.paths import run_dir
from biollm.errors import CompletionError
from biollm.providers.credentials import Credential
from biollm.routing import load_balancing
from biollm.routing.deployments import Deployment, build_deployments
from biollm.slurm.endpoints import Endpoint, Figures, figures

OLDER = "vllm:gpu_cache_usage_perc"


def said(running: float, waiting: float = 0, cache: float = 0, *, name: str = "vllm:kv_cache_usage_perc") -> str:
    """Return what vLLM writes at /metrics."""
    label = '{engine="0",model_name="mine"}'
    lines = [
        "# HELP vllm:num_requests_running Number of requests in model execution batches.",
        "# TYPE vllm:num_requests_running gauge",
        f"vllm:num_requests_running{label} {float(running)}",
        f"vllm:num_requests_waiting{label} {float(waiting)}",
        f'vllm:num_requests_waiting_by_reason{{engine="0",reason="capacity"}} {float(waiting)}',
        f"{name}{label} {cache}",
        f"vllm:prompt_tokens_total{label} 1.0e+06",
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (said(2, 1, 0.25), Figures(2, 1, 0.25)),
        (said(2, 1, 0.25, name=OLDER), Figures(2, 1, 0.25)),
        (said(2, 1, 0.25) + said(3, 0, 0.5), Figures(5, 1, 0.5)),  # an engine each
        (said(0, 0, 1.1e-05), Figures(0, 0, 1.1e-05)),
        ("vllm:num_requests_running 4\n", Figures(4, 0, 0.0)),
        ("vllm:num_requests_running NaN\n", None),
        ('{"detail": "Not Found"}', None),
        ("", None),
    ],
)
def test_what_vllm_says_becomes_figures(text: str, expected: Figures | None) -> None:
    assert figures(text) == expected


Replicas = Callable[..., Client]


@pytest.fixture
def replicas(waterfall: Callable[..., Path], tmp_path: Path) -> Replicas:
    """Let a client find these running servers of one model; how they are found is tested elsewhere."""

    def make(*servers: Server) -> Client:
        local = {"mine": {"type": "local", "hf_id": "lab/mine"}}
        waterfall({"models": local}, vllm={"type": "local", "models": ["mine"]})
        key = tmp_path / "key"
        key.write_text("the-key-of-the-start")
        for number, server in enumerate(servers):
            server.start_id, server.key = f"{number}{os.urandom(15).hex()}", key.read_text()
        found = tuple(
            Endpoint(
                start=server.start_id, job="1", submission="t", model="mine", host="localhost",
                base_url=server.url, key_file=key, owner=os.getuid(), left_s=3600.0, link=1,
            )
            for server in servers
        )  # fmt: skip
        client = get_model_client()
        cluster = client.config.cluster
        background().kept["watch", run_dir(cluster), cluster.trusted_owners] = SimpleNamespace(
            alive=lambda: found, latest=lambda: found, awake=True, settle=lambda _: True
        )
        return client

    return make


def told(client: Client, count: int) -> Client:
    """Wait until so many servers have said how busy they are: a request waits for that 0.3 s, and not every time."""
    deadline = time.monotonic() + 30
    while sum(candidate.load is not None and candidate.load.told is not None for candidate in client.explain()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return client


def looks(server: Server) -> int:
    return sum(request.path == "/metrics" for request in server.requests)


def shares(client: Client, count: int, *servers: Server) -> list[int]:
    """Send `count` requests at once, none of which is answered; return how many each server has when all are there."""
    for server in servers:
        server.behaviour = lambda request: HANG if request.path.endswith("/completions") else OK

    async def ask() -> list[int]:
        tasks = [asyncio.create_task(client.acomplete("hi")) for _ in range(count)]
        deadline = time.monotonic() + 30
        while sum(len(server.completions) for server in servers) < count and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        found = [len(server.completions) for server in servers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("first", "second", "answers"),
    [
        (said(7), said(0), "second"),
        (said(0), said(7), "first"),
        (said(1, 8), said(5), "second"),  # who waits counts too
        (said(3, 0, 0.9), said(3, 0, 0.2), "second"),  # the fuller cache, among equals
        (said(3, 0, 0.2), said(3, 0, 0.9, name=OLDER), "first"),
    ],
)
def test_the_least_busy_replica_answers(
    net: Loopback, replicas: Replicas, first: str, second: str, answers: str
) -> None:
    one, two = net.serve(text="first"), net.serve(text="second")
    one.metrics, two.metrics = first, second
    client = told(replicas(one, two), 2)
    assert {client.complete("hi").text for _ in range(4)} == {answers}
    assert "".join(map(str, client.stream("hi"))) == answers
    assert client.complete("hi", fallback=False).text == answers
    asked = next(request for request in one.requests if request.path == "/metrics")
    assert asked.headers["authorization"] == "Bearer the-key-of-the-start"


@pytest.mark.slow
def test_the_look_is_kept_for_a_second_and_then_renewed(net: Loopback, replicas: Replicas) -> None:
    one, two = net.serve(text="first"), net.serve(text="second")
    one.metrics, two.metrics = said(7), said(0)
    client = replicas(one, two)
    began = time.monotonic()
    assert told(client, 2).complete("hi").text == "second"
    one.metrics, two.metrics = said(0), said(9)
    while client.complete("hi").text == "second":
        assert time.monotonic() - began < 30
    assert time.monotonic() - began >= load_balancing.FRESH
    assert looks(one) <= 1 + (time.monotonic() - began) / load_balancing.FRESH


def test_twenty_at_once_spread_evenly(net: Loopback, replicas: Replicas) -> None:
    one, two = net.serve(), net.serve()
    one.metrics = two.metrics = said(0)
    assert shares(told(replicas(one, two), 2), 20, one, two) == [10, 10]


def test_twenty_at_once_fill_the_idle_one_first(net: Loopback, replicas: Replicas) -> None:
    one, two = net.serve(), net.serve()
    one.metrics, two.metrics = said(4, 2), said(0)
    assert shares(told(replicas(one, two), 2), 20, one, two) == [7, 13]


@pytest.mark.slow
def test_what_a_server_says_of_our_own_requests_is_not_counted_twice(net: Loopback, replicas: Replicas) -> None:
    def counts(server: Server, others: int) -> None:
        def how(request: Request) -> Behaviour:
            return HANG if request.path != "/metrics" else Behaviour(body=said(others + len(server.completions)))

        server.behaviour = how

    shared, idle = net.serve(), net.serve()
    counts(shared, 4)
    counts(idle, 0)
    client = replicas(shared, idle)

    async def ask() -> list[list[int]]:
        tasks: list[asyncio.Task[Any]] = []
        found: list[list[int]] = []
        for count, busy in ((8, 6), (12, 12)):
            tasks += [asyncio.create_task(client.acomplete("hi")) for _ in range(count)]
            for _ in range(1000):  # until both have said so
                rungs = await asyncio.to_thread(client.explain)
                if [candidate.load and candidate.load.told and candidate.load.told.running for candidate in rungs] == [
                    busy,
                    busy,
                ]:
                    break
                await asyncio.sleep(0.02)
            found.append([len(shared.completions), len(idle.completions)])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found

    assert asyncio.run(ask()) == [[2, 6], [8, 12]]


DEAD = [
    HTTP_500,
    HANG,
    Behaviour(drip=True),
    Behaviour(body="<html>", content_type="text/html"),
    Behaviour(body="vllm:num_requests_running{ 1-2\nvllm:num_requests_running 1-2\n"),
]


@pytest.mark.slow
@pytest.mark.parametrize("dead", DEAD, ids=["500", "hangs", "drips", "html", "garbage"])
def test_without_metrics_the_process_counts_its_own_and_asks_no_more(
    net: Loopback, replicas: Replicas, dead: Behaviour
) -> None:
    one, two = (net.serve(then=lambda r: dead if r.path == "/metrics" else OK) for _ in range(2))
    client = replicas(one, two)
    for _ in range(3):
        client.complete("hi")
    assert (looks(one), looks(two)) == (1, 1)
    one.requests.clear()
    two.requests.clear()
    assert shares(client, 20, one, two) == [10, 10]


def test_a_silent_replica_is_not_sought_for_its_silence(net: Loopback, replicas: Replicas) -> None:
    busy, silent = net.serve(), net.serve()
    busy.metrics = said(40)
    assert shares(told(replicas(busy, silent), 1), 20, busy, silent) == [10, 10]


def test_a_failing_replica_is_followed_by_the_busier_one(net: Loopback, replicas: Replicas) -> None:
    idle, busy = net.serve(then=lambda r: OK if r.path == "/metrics" else HTTP_500), net.serve(text="from busy")
    idle.metrics, busy.metrics = said(0), said(9)
    assert told(replicas(idle, busy), 2).complete("hi").text == "from busy"
    assert len(idle.completions) == 2, "one more try at the same deployment"


@pytest.mark.slow
def test_repeats_without_fallback_stay_at_the_replica_that_was_chosen(net: Loopback, replicas: Replicas) -> None:
    servers = [net.serve(), net.serve()]
    for server in servers:
        failing = [limited("0.2")] * 4
        server.behaviour = lambda r, left=failing: left.pop() if left and r.path != "/metrics" else OK
    replicas(*servers).complete("hi", fallback=False, max_retries=4)
    assert sorted(len(server.completions) for server in servers) == [0, 5]


def test_nobody_is_asked_for_metrics_where_there_is_no_choice(net: Loopback, replicas: Replicas) -> None:
    one = net.serve()
    client = replicas(one)
    assert [client.complete("hi").text for _ in range(3)] == ["All is well."] * 3
    assert client.explain()[0].load is None
    assert looks(one) == 0


def test_a_cloud_api_is_never_asked_for_metrics(net: Loopback, replicas: Replicas) -> None:
    one, two = net.serve(), net.serve()
    one.metrics, two.metrics = said(1), said(2)
    client = replicas(one, two)
    found = build_deployments(client.config, [*_alive(client)])

    def ask(local: bool) -> dict[str, load_balancing.Load]:
        some = [replace(each, local=local) for each in found]
        return background().run(fresh.loads(some, keyed(client, found)))

    fresh, deadline = load_balancing.Balance(), time.monotonic() + 30
    assert [load.told for load in ask(local=False).values()] == [None, None]
    assert (looks(one), looks(two)) == (0, 0)
    while [load.others for load in ask(local=True).values()] != [1, 2]:
        assert time.monotonic() < deadline


def keyed(client: Client, found: Sequence[Deployment]) -> Any:
    key = Credential("the-key-of-the-start")
    return SimpleNamespace(credentials={each.id: key for each in found}, config=client.config)


def _alive(client: Client) -> Any:
    cluster = client.config.cluster
    return background().kept["watch", run_dir(cluster), cluster.trusted_owners].alive()


def test_accounts_share_what_is_under_way(net: Loopback, waterfall: Callable[..., Path]) -> None:
    server = net.serve(then=HANG)
    accounts = [{"name": name, "env_key": f"{name.upper()}_KEY"} for name in ("lab", "core")]
    waterfall(lab=net.serve(), core=net.serve(), api={"base_url": server.url, "accounts": accounts, "priority": 0})
    assert shares(get_model_client(), 20, server) == [20]
    keys = Counter(request.headers["authorization"].split("-")[2] for request in server.completions)
    assert keys == {"lab": 10, "core": 10}
    assert looks(server) == 0


def test_what_is_over_is_no_longer_under_way(net: Loopback, waterfall: Callable[..., Path]) -> None:
    waterfall(
        limited={"base_url": net.serve().url, "rate_limit": "1/day"}, failing=net.serve(then=HTTP_429), good=net.serve()
    )
    client, under_way = get_model_client(), load_balancing.of_process().under_way
    seen: list[int] = []
    for _ in range(2):
        client.complete("hi", on_send=lambda _: seen.append(len(under_way)))
    for piece in client.stream("hi"):
        seen.append(len(under_way))
        assert piece is not None
        break
    with pytest.raises(CompletionError):
        client.complete("hi", provider="failing", fallback=False)
    deadline = time.monotonic() + 10
    while len(under_way) and time.monotonic() < deadline:  # a stream that is left ends beside us
        time.sleep(0.01)
    assert len(under_way) == 0
    assert set(seen) == {1}


def test_explain_shows_what_the_replicas_have_to_do(
    net: Loopback, replicas: Replicas, biollm: Callable[..., Any]
) -> None:
    one, two, mute = net.serve(), net.serve(), net.serve()
    one.metrics, two.metrics = said(7, 2, 0.31), said(1)
    ids = [each.deployment.id for each in told(replicas(one, two, mute), 2).explain()]
    lines = biollm("explain").out.splitlines()
    reasons = [" ".join(line.split()) for line in lines]
    assert reasons[1:4] == [
        f"1 {ids[0]} ready 9 of others + 0 of this process = 9 in flight (7 running, 2 waiting, cache 31%)",
        f"→ 1 {ids[1]} ready 1 of others + 0 of this process = 1 in flight (1 running, 0 waiting, cache 0%)",
        f"1 {ids[2]} ready 9 assumed + 0 of this process = 9 in flight (no metrics)",
    ]
    assert lines[-1] == f"{ids[1]} would answer."
    facts = biollm("explain", "--json").json
    assert [fact["load"] for fact in facts] == [
        {"own": 0, "others": 9, "metrics": {"running": 7, "waiting": 2, "cache": 0.31}},
        {"own": 0, "others": 1, "metrics": {"running": 1, "waiting": 0, "cache": 0.0}},
        {"own": 0, "others": 9, "metrics": None},
    ]
    assert not any(server.completions for server in (one, two, mute))


def test_a_look_is_bounded_whatever_hangs(net: Loopback, replicas: Replicas) -> None:
    def hangs(request: Request) -> Behaviour:
        return HANG if request.path == "/metrics" else OK

    servers = [net.serve(then=hangs) for _ in range(8)]
    client = replicas(*servers)
    client.complete("hi", model="mine")  # imports, connections
    found = build_deployments(client.config, [*_alive(client)])
    fresh = load_balancing.Balance()
    waited = []
    for _ in range(2):
        began = time.monotonic()
        background().run(fresh.loads(found, keyed(client, found)))
        waited.append(time.monotonic() - began)
    assert waited[0] < load_balancing.PATIENCE, "all at once"
    assert waited[1] < waited[0], "and not again"
