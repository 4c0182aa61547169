"""While one rung lives the caller gets its answer, whatever the others do, and nothing is sent twice to the same place.

Every fault in every place of the waterfall, through all four faces of the client at once. Each case has deployments of
its own, told apart by the model's name and the path of the URL, so that no case sees what another left cooling while
few clients serve all of them.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import behaviours as b
import pytest
import yaml
from behaviours import Behaviour
from provider import Certificates, Loopback, Request, Server

from biollm._runtime import background
from biollm.client import (
    Attempt,
    Client,
    CompletionError,
    StreamRestarted,
    get_model_client,
)
from biollm.config.paths import run_dir
from biollm.routing.litellm_private import OWN_HANDLER
from biollm.slurm.endpoints import Endpoint

pytestmark = pytest.mark.timeout(60)


@dataclass(frozen=True)
class Fault:
    """One way to fail.

    Attributes:
        plain: What the attempt's reason says; "" where the answer is good.
        how: What the server does, or the URL under which nothing answers (see `_urls`).
        stream: The reason when streaming, if it is another.
        alone: Concerns the account, the model or the request, not the address: the other account is asked.
        slip: May be a slip: where nobody else of its order can answer, it is asked once more. "plain" says not in streams.
        slow: Ends only with the attempt's timeout.
    """

    plain: str
    how: Behaviour | str
    stream: str | None = None
    alone: bool = False
    slow: bool = False
    slip: str = ""

    def reason(self, face: str) -> str:
        return self.stream if "stream" in face and self.stream is not None else self.plain


LATE = r"no (answer|further text) (within|in time)"
BROKE = "the connection broke"
NOT_JSON = "not valid JSON"
CUT = "ended before it was complete"
FAULTS = {
    "refused": Fault("the connection was refused", "refused"),
    "dropped": Fault(LATE, "dropped", slow=True),
    "dns": Fault("does not resolve", "dns"),
    "tls": Fault("TLS handshake failed", "tls"),
    "private-ca": Fault("certificate is not trusted .* SSL_CERT_FILE", "private-ca"),
    "proxy-403": Fault(r"the proxy refused \(HTTP 403\)", "proxy"),
    "proxy-407": Fault(r"the proxy refused \(HTTP 407\)", "proxy"),
    "400": Fault("HTTP 400: Invalid value for 'temperature'", b.HTTP_400, alone=True),
    "401": Fault("HTTP 401: Incorrect API key", b.HTTP_401, alone=True),
    "403": Fault("HTTP 403: This account may not use", b.HTTP_403, alone=True),
    "404": Fault("HTTP 404: The model does not exist", b.HTTP_404, alone=True),
    "408": Fault("HTTP 408: Request timed out", b.HTTP_408, alone=True),
    "429": Fault(r"HTTP 429: Rate limit reached.*cooldown 60 s", b.HTTP_429, alone=True),
    "429-after": Fault(r"HTTP 429: .*cooldown 1234 s", b.limited("1234"), alone=True),
    "429-fraction": Fault(r"HTTP 429: .*cooldown 1.5 s", b.limited("1.5"), alone=True),
    "429-gemini": Fault(r"HTTP 429: .*cooldown 17 s", b.gemini_limited("Minute", "17s"), alone=True),
    "500": Fault("HTTP 500: Internal server error", b.HTTP_500, alone=True, slip="both"),
    "502": Fault("HTTP 502: ", b.HTTP_502, alone=True, slip="both"),
    "503": Fault("HTTP 503: The engine is overloaded", b.HTTP_503, alone=True, slip="both"),
    "529": Fault("HTTP 529: Overloaded", b.HTTP_529, alone=True, slip="both"),
    "hang": Fault(LATE, b.HANG, alone=True, slow=True),
    "hang-in-body": Fault(LATE, b.HANG_IN_BODY, alone=True, slow=True),
    "hang-after-text": Fault(LATE, Behaviour(hang=3), alone=True, slow=True),
    "drip": Fault(LATE, b.DRIP, alone=True, slow=True),
    "html": Fault(NOT_JSON, b.HTML, CUT, alone=True),
    "truncated": Fault(NOT_JSON, b.TRUNCATED, f"{CUT}|{NOT_JSON}", alone=True),
    "no-choices": Fault("no choices", b.NO_CHOICES, f"{CUT}|no content", alone=True),
    "empty": Fault("no content", b.EMPTY, alone=True),
    "cut": Fault(NOT_JSON, b.CUT, CUT, alone=True),
    "torn": Fault(BROKE, b.TORN, alone=True),
    "error-event": Fault("HTTP 500", b.SSE_ERROR, "EngineCore died", alone=True, slip="plain"),
    "context": Fault("HTTP 400: This model's maximum context length", b.CONTEXT_TOO_LONG, alone=True),
    "policy": Fault("HTTP 400: Your request was rejected", b.CONTENT_POLICY, alone=True),
    "length-over": Fault(BROKE, b.LENGTH_OVER, "", alone=True),  # all of a stream came, whatever its length
    "length-under": Fault(f"{NOT_JSON}|{BROKE}", b.LENGTH_UNDER, f"{CUT}|{BROKE}", alone=True),
}
GROUP = 12  # faults per client: each choice of LiteLLM's costs the more, the more deployments there are
FACES = ("sync", "async", "sync-stream", "async-stream")
# In each place: what becomes of whom. Nobody else is asked, and nobody twice.
PLACES = {
    "first": ["faulty failed", "good ok"],
    "middle": ["poor failed", "faulty failed", "good ok"],
    "last": ["poor failed", "poorer failed", "faulty failed"],
    "replica": ["faulty failed", "good ok"],
    "account": ["lab failed", "core ok"],
}
ADDRESS = ["failed", "cooling", "spare ok"]  # the fault concerns the address, which both accounts share
SILENT = ["failed", "failed", "spare ok"]  # so it does here, but a silence shows that only when it repeats


@dataclass(frozen=True, repr=False)
class Net:
    """The servers of all cases. What `faulty` does depends on the case; the others always do the same.

    Attributes:
        running: (name, case) -> a server that stands in a record, which proves its own start.
    """

    net: Loopback
    running: dict[tuple[str, str], Server]
    faulty: Server
    good: Server
    spare: Server
    poor: Server
    proxy: Server
    urls: Mapping[str, str]

    def url(self, place: str, fault: str, face: str) -> str:
        """Return the address of the case's faulty deployment, like no other case's."""
        how = FAULTS[fault].how
        base = self.urls[how].replace("CASE", case(place, fault, face)) if isinstance(how, str) else self.faulty.url
        return f"{base}/{case(place, fault, face)}"

    def sent(self, place: str, fault: str, face: str) -> Counter[str]:
        """Return how often each server, or each account, was sent the case's prompt."""
        count = Counter[str]()
        for name in ("faulty", "good", "spare", "poor"):
            own = self.running.get((name, case(place, fault, face)))
            for request in [*getattr(self, name).completions, *(own.completions if own else ())]:
                if request.body["model"] == case(place, fault, face):
                    whose = re.search("key-(lab|core)", request.headers["authorization"])
                    count[whose[1] if whose else name] += 1
        count["faulty"] += sum(r.path.startswith(f"{case(place, fault, face)}.") for r in self.proxy.requests)
        return +count


@dataclass(frozen=True)
class Told:
    """What a caller got: the text, or the error."""

    text: str
    attempts: tuple[Attempt, ...]
    error: CompletionError | None = None


pytestmark = pytest.mark.slow  # each takes seconds
SENDERS = {
    "OpenAI's SDK": {OWN_HANDLER: ""},
    "LiteLLM's own": {OWN_HANDLER: "True"},
    "direct": {OWN_HANDLER: "", "BIOLLM_SENDER": "direct"},
}


@pytest.fixture(scope="module", autouse=True, params=SENDERS.values(), ids=SENDERS)
def state(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One state folder for each sender, so that its clients last; keys; and no proxy of the user's.

    LiteLLM sends as in a host program, and as in programs of ours.
    """
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("BIOLLM_") or name.lower().endswith("_proxy"):
                patch.delenv(name)
        for name, value in request.param.items():
            patch.setenv(name, value)
        patch.setenv("BIOLLM_STATE_DIR", str(folder))
        patch.setenv("BIOLLM_SITE_CONFIG", str(folder / "none"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "none"))
        for name in ("NO_PROXY", "no_proxy"):  # a client adds its local hosts to both: taken back at the end
            patch.setenv(name, "127.0.0.1,nobody.invalid")
        patch.setenv("GOOD_KEY", "key-good")
        yield folder


@pytest.fixture(scope="module")
def servers(state: Path, net: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    def misbehave(request: Request) -> Behaviour:
        if "key-core" in request.headers["authorization"]:
            return Behaviour(text="from core")
        how = FAULTS[request.body["model"].split("--")[0]].how
        assert isinstance(how, Behaviour)
        return how

    proxy = net.serve(then=lambda request: b.PROXY_403 if "proxy-403" in request.path else b.PROXY_407)
    urls = {
        "refused": net.refusing(),
        "dropped": net.dropping(),
        "dns": "https://nobody.invalid/v1",
        "tls": net.serve().url.replace("http:", "https:"),
        "private-ca": net.serve(tls=Certificates.make(tmp_path_factory.mktemp("tls"))).url,
        "proxy": "https://CASE.invalid/v1",
    }
    faulty, good, spare = net.serve(then=misbehave), net.serve(text="from good"), net.serve(text="from spare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTPS_PROXY", proxy.url.removesuffix("/v1"))
        yield Net(net, {}, faulty, good, spare, net.serve(then=b.HTTP_404), proxy, urls)


def case(place: str, fault: str, face: str) -> str:
    """Return the case's name, which is also its model's."""
    return f"{fault}--{place}--{face}"


def key_file(folder: Path, whose: str, model: str) -> Path:
    """Write a key of the case's own: a refused one rests wherever the account uses it."""
    path = folder / f"{whose}-{model}.key"
    path.write_text(f"key-{whose}-{model}")
    path.chmod(0o600)
    return path


def cases(place: str, faults: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return model -> (fault, face)."""
    return {case(place, fault, face): (fault, face) for fault, face in product(faults, FACES)}


def providers(net: Net, place: str, some: Mapping[str, tuple[str, str]], folder: Path) -> dict[str, Any]:
    """Return the providers of a place: a faulty one for each case, and others that all cases share."""
    found: dict[str, Any] = {}
    shared = {"poor": (0, net.poor), "poorer": (0, net.poor), "good": (2, net.good), "spare": (3, net.spare)}
    named = {word.split()[0] for word in PLACES[place]} | (set() if place in ("middle", "last") else {"spare"})
    for name in shared.keys() & named - ({"good"} if place == "replica" else set()):
        priority, server = shared[name]
        common = {"type": "api", "models": list(some), "env_key": "GOOD_KEY"}
        found[name] = {**common, "priority": priority, "base_url": server.url}
    if place == "replica":
        for name, slow in (("vllm-slow", True), ("vllm", False)):
            models = [model for model, (fault, _) in some.items() if FAULTS[fault].slow == slow]
            found[name] = {"type": "local", "priority": 1, "models": models, "timeout": 1.5 if slow else 60}
        return found
    for model, (fault, face) in some.items():
        who: dict[str, Any] = {"key_file": str(key_file(folder, "faulty", model))}
        if place == "account":
            # LiteLLM draws by these limits, so `lab` is as good as always drawn first.
            limits = {"lab": "1000000/min", "core": "100/min"}
            who = {
                "accounts": [
                    {"name": name, "key_file": str(key_file(folder, name, model)), "rate_limit": limit}
                    for name, limit in limits.items()
                ]
            }
        timeout = 60 if not FAULTS[fault].slow else 1.5 if place == "account" else 0.3
        entry = {"type": "api", "priority": 1, "models": [model], "base_url": net.url(place, fault, face)}
        found[f"faulty-{model}"] = {**entry, **who, "timeout": timeout}
    return dict(sorted(found.items(), key=lambda item: item[0] == "poorer"))


def replicas(net: Net, place: str, some: Mapping[str, tuple[str, str]], folder: Path) -> Iterator[Endpoint]:
    """Yield two running servers for each case."""
    for model, (fault, face) in some.items():
        for name, like in (("faulty", net.faulty), ("good", net.good)):
            key, url = key_file(folder, name, model), net.url(place, fault, face)
            if name == "good" or not isinstance(FAULTS[fault].how, str):
                server = net.running[name, model] = net.net.serve(then=like.behaviour, text=like.text)
                yield running_server(f"{name}-{model}", model, server, key)
            else:
                yield replace(running_server(f"{name}-{model}", model, net.net.serve(), key), base_url=url)


def running_server(start: str, model: str, server: Server, key: Path) -> Endpoint:
    """Let a server be what a live record says, and return that."""
    server.start_id, server.key = start, key.read_text()
    return Endpoint(
        start=start, job="1", submission="t", model=model, host="localhost", base_url=server.url, key_file=key,
        owner=os.getuid(), left_s=3600.0, link=1,
    )  # fmt: skip


def discovered(client: Client, alive: Callable[[], tuple[Endpoint, ...]]) -> None:
    """Let the client find these servers; how they are found is tested elsewhere."""
    cluster = client.config.cluster
    background().kept["watch", run_dir(cluster), cluster.trusted_owners] = SimpleNamespace(
        alive=alive, latest=alive, awake=True, settle=lambda _: True
    )


@pytest.fixture(scope="module")
def client(servers: Net, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Client]:
    found: list[Endpoint] = []

    @cache
    def make(place: str, group: int) -> Client:
        folder = tmp_path_factory.mktemp(place)
        some = cases(place, list(FAULTS)[group * GROUP : (group + 1) * GROUP])
        local = {model: {"type": "local", "hf_id": "lab/model"} for model in some}
        routing = {"on_refusal": "next"}
        whole = {
            "inherit": False,
            "routing": routing,
            "providers": providers(servers, place, some, folder),
            "models": local,
        }
        (folder / "providers.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        made = get_model_client(config_dir=folder)
        if place == "replica":
            found.extend(replicas(servers, place, some, folder))
            discovered(made, lambda: tuple(found))
        return made

    return lambda place, fault: make(place, list(FAULTS).index(fault) // GROUP)


def ask(client: Client, face: str, **options: Any) -> Told:
    """Ask through one of the four faces; a stream starts again when it breaks."""

    async def gather() -> list[Any]:
        return [piece async for piece in client.astream("hi", on_interrupt="restart", **options)]

    try:
        if face == "sync":
            done = client.complete("hi", **options)
        elif face == "async":
            done = asyncio.run(client.acomplete("hi", **options))
        else:
            sync = face == "sync-stream"
            pieces = list(client.stream("hi", on_interrupt="restart", **options)) if sync else asyncio.run(gather())
            begun = [at for at, piece in enumerate(pieces) if isinstance(piece, StreamRestarted)]
            done = pieces[-1].completion
            assert "".join(map(str, pieces[begun[-1] if begun else 0 :])) == done.text
        return Told(done.text, done.attempts)
    except CompletionError as error:
        return Told("", error.attempts, error)


def until_it_failed(client: Client, place: str, fault: str, face: str) -> tuple[Told, int]:
    """Ask until the faulty one was drawn, where LiteLLM draws among equals; return the last answer and the draws."""
    for draws in range(1, 50):
        told = ask(client, face, model=case(place, fault, face))
        if len(told.attempts) > 1 or not FAULTS[fault].reason(face):
            return told, draws
        assert told.text in ("from good", "from core")
    raise AssertionError("the faulty one was never drawn")


@pytest.mark.parametrize(
    ("place", "fault"),
    # Servers on the cluster are never asked through a proxy.
    [(place, fault) for place in PLACES for fault in FAULTS if "replica proxy" not in f"{place} {fault}"],
)
def test_the_first_that_can_answer_does(
    client: Callable[[str, str], Client], servers: Net, place: str, fault: str, subtests: pytest.Subtests
) -> None:
    with ThreadPoolExecutor(len(FACES)) as pool:
        asked = {face: pool.submit(until_it_failed, client(place, fault), place, fault, face) for face in FACES}
    for face in FACES:
        with subtests.test(face):
            check(*asked[face].result(), servers, place, fault, face)


def check(told: Told, draws: int, net: Net, place: str, fault: str, face: str) -> None:
    how, reason = FAULTS[fault].how, FAULTS[fault].reason(face)
    if not reason:
        assert told.attempts[-1].outcome == "ok"
        return
    became = [f"{name(attempt)} {attempt.outcome}" for attempt in told.attempts]
    failed = next(attempt for attempt in told.attempts if name(attempt) in ("faulty", "lab", "core"))
    assert re.search(reason, failed.reason), failed
    sent = net.sent(place, fault, face)
    # On a busy machine the time of a slow one may be over before it was sent.
    unsent = FAULTS[fault].slow and isinstance(how, Behaviour) and not sent[name(failed)]
    if place == "account" and not (FAULTS[fault].alone or re.search(CUT, failed.reason) or unsent):
        wanted = SILENT if FAULTS[fault].slow else ADDRESS
        assert [each.removeprefix("lab ").removeprefix("core ") for each in became] == wanted
    else:
        slip = FAULTS[fault].slip == "both" or (FAULTS[fault].slip == "plain" and "stream" not in face)
        twice = 2 if slip and place in ("first", "middle", "last") else 1
        assert became == [each for each in PLACES[place] for _ in range(twice if each == "faulty failed" else 1)]
    if place == "last":
        assert all(attempt.reason in str(told.error) for attempt in told.attempts)
    else:
        assert told.text == f"from {name(told.attempts[-1])}"
    count = Counter(each.split()[0] for each in became if not each.endswith(("limited", "cooling", "refused")))
    count["poor"] += count.pop("poorer", 0)
    count["core" if place == "account" else "good"] += draws - 1
    if isinstance(how, str) or unsent:
        count[name(failed)] = 0
        count["core"] *= FAULTS[fault].how != "dropped"  # which asks it too, at the same address
    if how == "proxy":  # the fault lies on the way: nothing arrives but the proxy's CONNECT
        count["faulty"] = 1
    assert sent == +count


def name(attempt: Attempt) -> str:
    """Return who it was: "faulty", "good", "spare", "poor", or the account."""
    found = re.search(r"#(faulty|good)-|\.(lab|core)/", attempt.deployment)
    return found[found.lastindex or 0] if found else re.split("[-/]", attempt.deployment)[0]


def test_a_server_that_leaves_while_it_is_asked_is_followed_by_the_next(net: Loopback, tmp_path: Path) -> None:
    leaves, stays = net.serve(then=b.HANG_IN_BODY), net.serve(text="from the one that stayed")
    (tmp_path / "key").write_text("key")
    models = {"small": {"type": "local", "hf_id": "lab/small"}}
    whole = {"inherit": False, "models": models, "providers": {"vllm": {"type": "local", "models": ["small"]}}}
    (tmp_path / "providers.yaml").write_text(yaml.safe_dump(whole))
    client = get_model_client(config_dir=tmp_path, provider="vllm")
    running = [running_server("leaves", "small", leaves, tmp_path / "key")]
    discovered(client, lambda: tuple(running))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.complete, "hi")
        while not leaves.requests:
            time.sleep(0.01)
        running[:] = [running_server("stays", "small", stays, tmp_path / "key")]
        assert client.complete("hi").text == "from the one that stayed"
        net.stop(leaves)
        told = waiting.result()
    assert [attempt.outcome for attempt in told.attempts] == ["failed", "ok"]


@pytest.mark.parametrize("kind", ["openai", "hosted_vllm"])
@pytest.mark.parametrize("face", FACES)
def test_what_is_given_up_is_closed(net: Loopback, waterfall: Callable[..., Path], kind: str, face: str) -> None:
    server = net.serve(then=b.DRIP)
    client = get_model_client(config_dir=waterfall(slow={"base_url": server.url, "litellm_provider": kind}))
    assert ask(client, face, timeout=0.5).error
    while server.tasks:  # until the server notices that nobody reads any more
        time.sleep(0.01)


def test_a_private_authority_is_trusted_by_SSL_CERT_FILE(  # noqa: N802
    net: Loopback, waterfall: Callable[..., Path], tmp_path: Path
) -> None:
    certificates = Certificates.make(tmp_path)
    waterfall(campus=net.serve(tls=certificates, text="from campus"))
    command = [Path(sys.executable).with_name("biollm"), "complete", "hi"]
    trusting = {**os.environ, "SSL_CERT_FILE": str(certificates.authority)}
    done = subprocess.run(command, env=trusting, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "from campus"), done.stderr
