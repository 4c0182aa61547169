"""Plays the sixteen scenarios of failoverbench (methodology 0.1) against biollm, and judges each as it does.

A primary model misbehaves, a fallback is healthy; all calls stream, and the healthy answer is a text of 60 words.
Both models may be at two addresses or behind one. All runs go on beside each other, each with servers and models of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import behaviours as b
import httpx
import yaml
from behaviours import OK, Behaviour
from provider import Choice, Loopback, Request, Server

from biollm.client import Client, CompletionError, Options, StreamRestarted
from biollm.gateway import server as _serve

TEXT = " ".join(f"word{number}" for number in range(60))
HEAD = 2  # pieces of a stream before its first word: the headers, the role
REFUSES_PREFILL = "The last message must not be from the assistant."
BOUND = 100.0  # seconds after which a call counts as hanging
PASS, PARTIAL, SAFE, FAIL = "pass", "partial", "safe", "fail"


@dataclass(frozen=True)
class Call:
    """What the caller of one request got: the text, or an error. Times in seconds."""

    text: str
    error: str
    began: float
    seconds: float
    model: str = ""
    usage: bool = False

    @property
    def good(self) -> bool:
        return self.text == TEXT and not self.error


@dataclass(frozen=True)
class Seen:
    """What happened in one run: the calls, and when the primary was asked, in seconds after the first request to it."""

    calls: Sequence[Call]
    asked: Sequence[float]
    primary: str
    fallback: str

    @property
    def first(self) -> Call:
        return self.calls[0]

    def within(self, seconds: float) -> int:
        """Return how often the primary was asked in its first `seconds`."""
        return sum(at <= seconds for at in self.asked)


def _always(_: Seen) -> bool:
    return True


@dataclass(frozen=True)
class Scenario:
    """One fault, and what is required and advised of a caller's library.

    Attributes:
        fault: In words.
        script: How the first requests to the primary are answered.
        then: How the later ones are.
        outage: Seconds from the first request on in which the primary answers 503.
        calls: How many, one every `every` seconds; all must be answered where there are several.
        reason: What a refusal says that is to reach the caller; an answer is then second best.
        never: What must not be the final error.
    """

    fault: str
    script: tuple[Behaviour, ...] = ()
    then: Behaviour = OK
    fallback: Choice = OK
    outage: float = 0.0
    calls: int = 1
    every: float = 0.0
    required: Callable[[Seen], bool] = _always
    advisory: Callable[[Seen], bool] = _always
    healthy_after: bool = False
    reason: str = ""
    never: str = ""

    def failure(self, seen: Seen) -> str:
        """Return pass, partial (an advisory check failed), safe (a bounded clean error) or fail."""
        main, after = seen.calls[: self.calls], seen.calls[self.calls :]
        truncated = any(not call.good and not call.error for call in seen.calls)
        hung = any(call.seconds > BOUND for call in seen.calls)
        lost = not all(call.good for call in (main if self.calls > 1 else after))
        told = any(self.never and self.never in call.error for call in main)
        if truncated or hung or lost or told or not self.required(seen):
            return FAIL
        if not main[0].good:
            return PASS if self.reason and self.reason in main[0].error else SAFE
        return PARTIAL if self.reason or not self.advisory(seen) else PASS


def picky(request: Request) -> Behaviour:
    """Refuse a conversation that ends with the assistant's own words."""
    prefilled = request.body["messages"][-1]["role"] == "assistant"
    return b.error(400, REFUSES_PREFILL) if prefilled else OK


def back(seen: Seen) -> bool:
    """Return whether the primary answers again within 30 s of its recovery."""
    return any(call.model == seen.primary for call in seen.calls if 60 < call.began < 90)


DIES = Behaviour(tear=HEAD + 40)
SCENARIOS = {
    "S01": Scenario("429 once with Retry-After: 2", (b.limited("2"),), required=lambda seen: seen.within(1.5) <= 2,
                    advisory=lambda seen: len(seen.asked) > 1 and seen.asked[1] >= 1.8),
    "S02": Scenario("429 without a header, always", then=b.HTTP_429,
                    required=lambda seen: seen.within(3) <= 4 and len(seen.asked) <= 6),
    "S03": Scenario("500 once", (b.HTTP_500,), required=lambda seen: seen.first.seconds < 45,
                    advisory=lambda seen: len(seen.asked) == 2),
    "S04": Scenario("503 always", then=b.HTTP_503, required=lambda seen: len(seen.asked) <= 6),
    "S05": Scenario("reset before the headers, once", (Behaviour(reset=0),)),
    "S06": Scenario("accepts and never answers", then=b.HANG, advisory=lambda seen: len(seen.asked) == 1),
    "S07": Scenario("headers at once, first token after 20 s", then=Behaviour(hang=1, pause=20),
                    advisory=lambda seen: seen.first.seconds < 15),
    "S08": Scenario("dies after 40 of 60 tokens", then=DIES),
    "S09": Scenario("silent after 20 tokens for 30 s, then closes",
                    (Behaviour(hang=HEAD + 20, pause=30, tear=HEAD + 20),),
                    required=lambda seen: seen.first.seconds < 45, healthy_after=True),
    "S10": Scenario("one more event, the tenth, is invalid JSON", (Behaviour(noise=10),), healthy_after=True),
    "S11": Scenario("whole, but no [DONE]", then=Behaviour(done=False),
                    required=lambda seen: seen.first.seconds < 8, advisory=lambda seen: seen.first.usage),
    "S12": Scenario("400 context_length_exceeded", then=b.CONTEXT_TOO_LONG,
                    required=lambda seen: len(seen.asked) == 1),
    "S13": Scenario("400 content_policy_violation", then=b.CONTENT_POLICY,
                    required=lambda seen: len(seen.asked) == 1, reason="rejected as a result of our safety system"),
    "S14": Scenario("dies after 40 tokens; the fallback takes no prefill", then=DIES, fallback=picky,
                    never=REFUSES_PREFILL),
    "S15": Scenario("503 for 60 s, then healthy; twenty calls", outage=60, calls=20, every=4, required=back,
                    advisory=lambda seen: seen.within(60) <= 6),
    "S16": Scenario("503 always", then=b.HTTP_503, required=lambda seen: seen.first.model == seen.fallback,
                    advisory=lambda seen: seen.first.usage),
}  # fmt: skip
LONG = ("S15", "S06", "S07", "S09")  # begun first
APART = 0.4  # seconds between the starts of two runs: a burst would be a load of its own
WIRINGS = ("two addresses", "one address")
TUNINGS = ("defaults", "tuned")
FACES = ("gateway", "client")
# What "tuned" is, for the gateway and for the client.
HEADERS = {"x-biollm-on-interrupt": "restart", "x-biollm-patience": "3"}
OPTIONS: Options = {"on_interrupt": "restart", "patience": 3.0}
# Verdicts published by failoverbench in September 2026: pass, partial, safe, fail.
PUBLISHED = {
    "an agent harness, the best system": (12, 3, 1, 0),
    "Portkey": (11, 2, 0, 3),
    "LiteLLM proxy and Router": (9, 3, 4, 0),
    "LangChain with_fallbacks": (9, 3, 4, 0),
    "Bifrost 2.1": (9, 3, 3, 1),
}


@dataclass(eq=False)
class Play:
    """One run: a scenario, with both models at two addresses or one, asked of one face."""

    scenario: str
    wiring: str
    tuning: str
    face: str
    servers: list[Server] = field(default_factory=list[Server])

    def __post_init__(self) -> None:
        self.name = "-".join((self.scenario, self.wiring[:3], self.tuning, self.face)).lower()
        self.plan = SCENARIOS.get(self.scenario, Scenario("nothing is broken"))
        self._since: list[float] = []

    def open(self, net: Loopback) -> None:
        """Start what stands for the provider or providers."""
        one = self.wiring == "one address"
        script, scenario = list(self.plan.script), self.plan

        def answer(request: Request) -> Behaviour:
            if request.body["model"].endswith("fallback"):
                return scenario.fallback if isinstance(scenario.fallback, Behaviour) else scenario.fallback(request)
            self._since.append(request.at)
            if scenario.outage:
                return b.HTTP_503 if request.at < self._since[0] + scenario.outage else OK
            return script.pop(0) if script else scenario.then

        self.servers = [net.serve(then=answer, text=TEXT) for _ in range(1 if one else 2)]

    def providers(self, priority: int) -> dict[str, Any]:
        """Return its entries in providers.yaml."""
        models = [f"{self.name}-primary", f"{self.name}-fallback"]
        groups = [models] if len(self.servers) == 1 else [[model] for model in models]
        return {
            f"{self.name}-{at}": {"type": "api", "priority": priority + at, "base_url": server.url, "models": group,
                                  "env_key": "FAILOVER_KEY"}
            for at, (server, group) in enumerate(zip(self.servers, groups, strict=True))
        }  # fmt: skip

    def seen(self, calls: Sequence[Call]) -> Seen:
        """Return what happened."""
        asked = [at - self._since[0] for at in self._since]
        names = [f"{self.name}-0/{self.name}-primary", f"{self.name}-{len(self.servers) - 1}/{self.name}-fallback"]
        return Seen(calls, asked, *names)


def plays() -> list[Play]:
    """Return every run."""
    return [
        Play(*each) for each in product(sorted(SCENARIOS, key=lambda name: name not in LONG), WIRINGS, TUNINGS, FACES)
    ]


def configure(folder: Path, some: Iterable[Play]) -> Path:
    """Write the configuration of these runs."""
    folder.mkdir(parents=True, exist_ok=True)
    providers: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for play in some:
        entries = play.providers(2 * len(providers) + 1)
        providers |= entries
        named = [model for entry in entries.values() for model in entry["models"]]
        models |= {model: {"type": "api", "capabilities": [play.name]} for model in named}
    whole = {"inherit": False, "providers": providers, "models": models}
    (folder / "providers.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return folder


async def run(some: Sequence[Play], ask: Callable[[Play], Any]) -> dict[Play, Seen]:
    """Let the runs go on beside each other; `ask` makes one call of one."""

    async def one(at: int, play: Play) -> Seen:
        await asyncio.sleep(APART * at)
        scenario, began, calls = play.plan, time.monotonic(), list[Call]()
        for number in range(scenario.calls + scenario.healthy_after):
            await asyncio.sleep(max(0.0, began + number * scenario.every - time.monotonic()))
            start = time.monotonic()
            try:
                async with asyncio.timeout(BOUND + 5):
                    text, error, model, usage = await ask(play)
            except TimeoutError:
                text, error, model, usage = "", "it hung", "", False
            calls.append(Call(text, error, start - began, time.monotonic() - start, model, usage))
        return play.seen(calls)

    found = await asyncio.gather(*(one(at, play) for at, play in enumerate(some)))
    return dict(zip(some, found, strict=True))


def of_client(clients: dict[str, Client]) -> Callable[[Play], Any]:
    """Return how to ask the Python client; `clients` has one for each tuning."""

    async def ask(play: Play) -> tuple[str, str, str, bool]:
        text, done = "", None
        try:
            async for piece in clients[play.tuning].astream("hi", capability=play.name):
                text = "" if isinstance(piece, StreamRestarted) else text + piece.text
                done = getattr(piece, "completion", None) or done
        except CompletionError as error:
            return text, str(error), "", False
        assert done
        return text, "", f"{done.provider}/{done.model}", done.usage.completion_tokens > 0

    return ask


def of_gateway(url: str, key: str) -> tuple[httpx.AsyncClient, Callable[[Play], Any]]:
    """Return how to ask the gateway as a plain client of OpenAI's dialect does, and the HTTP client to close."""
    limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(timeout=BOUND, limits=limits, trust_env=False, headers={"Authorization": f"Bearer {key}"})

    async def ask(play: Play) -> tuple[str, str, str, bool]:
        body = {"model": "biollm", "messages": [{"role": "user", "content": "hi"}], "stream": True,
                "stream_options": {"include_usage": True}, "biollm": {"capability": play.name}}  # fmt: skip
        headers = HEADERS if play.tuning == "tuned" else {}
        text, model, usage = "", "", False
        try:
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    return "", (await answer.aread()).decode(), "", False
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return text, json.dumps(chunk["error"]), "", False
                    model, usage = chunk["model"], usage or bool(chunk.get("usage"))
                    text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        except httpx.HTTPError as error:
            return text, repr(error), "", False
        return text, "", model, usage

    return http, ask


def environment(folder: Path) -> dict[str, str]:
    """Return the variables that `everything` needs."""
    return {
        "FAILOVER_KEY": "sk-failover-0123456789",
        "BIOLLM_CONFIG_DIR": str(folder / "gateway"),
        "BIOLLM_GATEWAY": "off",
        "BIOLLM_GATEWAY_KEY": "sk-gateway-0123456789",
        "BIOLLM_SITE_CONFIG": str(folder / "site"),
        "BIOLLM_STATE_DIR": str(folder / "state"),
        "XDG_CONFIG_HOME": str(folder / "xdg"),
        "XDG_RUNTIME_DIR": str(folder),
    }


def everything(folder: Path, some: Sequence[Play] = ()) -> dict[Play, Seen]:
    """Run all scenarios in every wiring and tuning against both faces; os.environ has what `environment` says."""
    some = some or plays()
    first = [Play("warm", WIRINGS[0], *each) for each in {(play.tuning, play.face) for play in some}]
    mine = {face: [play for play in (*first, *some) if play.face == face] for face in FACES}
    with Loopback() as net:
        for play in (*first, *some):
            play.open(net)
        configure(folder / "gateway", mine["gateway"])
        clients = {  # the configuration is one, the tuning each caller's
            tuning: Client(config_dir=configure(folder / "client", mine["client"]), **options)
            for tuning, options in (("defaults", Options()), ("tuned", OPTIONS))
        }
        url = _serve.detach(["--port", "0"])[0]["url"] if mine["gateway"] else ""
        try:
            return asyncio.run(_both(first, some, url, clients))
        finally:
            if url:
                _serve.stop(30)


async def _both(first: list[Play], some: Sequence[Play], url: str, clients: dict[str, Client]) -> dict[Play, Seen]:
    """Ask both faces, once LiteLLM is loaded in them."""
    http, of_the_gateway = of_gateway(url, os.environ["BIOLLM_GATEWAY_KEY"])
    faces = {"gateway": of_the_gateway, "client": of_client(clients)}
    async with http:
        for play in first:
            await faces[play.face](play)
        return await run(some, lambda play: faces[play.face](play))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(environment(Path(scratch)))
        print(json.dumps({play.name: play.plan.failure(seen) for play, seen in everything(Path(scratch)).items()}))
