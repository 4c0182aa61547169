"""Says who may serve a request now, and why each of the others may not. Sends nothing.

The deployments of the waterfall with what they need: a key, a claim on the ledger, weights. `explain` reads it, the
waterfall routes by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from biollm._ownership import in_the_clear
from biollm.config import Config
from biollm.errors import UnknownNameError
from biollm.ledger import Claim, Ledger, quotas
from biollm.providers import credentials, embedded
from biollm.providers.credentials import Credential
from biollm.routing.deployments import (
    LEAST_ANSWER,
    Deployment,
    Requirements,
    allowance,
    asked_for,
    build_deployments,
    ineligible_reason,
    informed,
    models_of,
)
from biollm.slurm import endpoints
from biollm.types import DataPolicy, Usage

if TYPE_CHECKING:
    from biollm.routing.pricing import Cost
    from biollm.slurm.endpoints import Endpoint, Figures

_REMEMBERED = 3600.0  # seconds for which a model's refusal of images is remembered in this process
_refused: dict[tuple[str, str, frozenset[str]], float] = {}

Status = Literal["ready", "limited", "refused", "keyless", "unfit", "absent"]


@dataclass(frozen=True)
class Load:
    """What a replica has to do.

    Attributes:
        own: This process's requests under way there.
        others: Everybody else's. A silent server is taken to have as many as the busiest that speaks, so that it is
            not sought for its silence.
        cache: Share of its key-value cache in use.
        told: What its server said, or None where it said nothing.
    """

    own: int
    others: int
    cache: float
    told: Figures | None

    @property
    def rank(self) -> tuple[int, float]:
        """Return what the least busy has least of; the cache tells between equal numbers of requests, in tenths."""
        return self.own + self.others, round(self.cache, 1)

    def __str__(self) -> str:
        told, total = self.told, f"{self.own} of this process = {self.own + self.others} under way"
        if told:
            said = f"{told.running} running, {told.waiting} waiting, cache {told.cache:.0%}"
            return f"{self.others} of others + {total} ({said})"
        return f"{self.others} assumed + {total} (no metrics)" if self.others else total.replace(f" = {self.own}", "")


@dataclass(frozen=True)
class Candidate:
    """A deployment and how it stands now.

    Attributes:
        standing: "ready"; "limited" (a quota or a cooldown, until `until`); "refused" (its key was refused);
            "keyless" (no key); "unfit" (the request needs or forbids something); "absent" (no server, no weights).
        reason: One sentence; empty when ready.
        until: Epoch seconds at which a limited rung frees.
        stated: Whether a limit or the provider names that time; else it is an estimate.
        cost: What its answer would cost, under `policy: cheapest`.
        load: What it has to do, where it is one of several ready replicas and somebody looked.
    """

    deployment: Deployment
    status: Status
    reason: str = ""
    until: float = 0.0
    cost: Cost | None = None
    load: Load | None = None
    stated: bool = True


@dataclass(frozen=True)
class Survey:
    """What a look at servers and credentials found; `deployments` is None where the servers are the same.

    Attributes:
        found: Credentials, or why there are none, of deployments that are new or lacked them.
    """

    servers: tuple[Endpoint, ...]
    deployments: list[Deployment] | None
    found: Sequence[tuple[Deployment, Credential | str]] = field(repr=False)


class DeploymentPool:
    """The deployments of one configuration.

    Args:
        config: The configuration.
        ledger: Shared with every process of the user.
        state: The folder of tokens and weights.
        policy: Overrides the configuration's data policy.
        discover: Returns the running servers; called before every request, so it must only look at memory.
        interval: Seconds between two looks for what a rung lacks.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        state: Path,
        policy: DataPolicy,
        discover: Callable[[], Iterable[Endpoint]] = tuple,
        interval: float = 5.0,
    ) -> None:
        self.config, self.ledger, self.state = config, ledger, state
        self.policy: DataPolicy = policy
        self._discover, self._interval = discover, interval
        self._servers: tuple[Endpoint, ...] | None = None
        self._looked = 0.0
        self.deployments: list[Deployment] = []
        self.credentials: dict[str, Credential] = {}
        self.claims: dict[str, Claim] = {}
        self._informed = False
        self._missing: dict[str, tuple[Status, str]] = {}

    def refresh(self) -> bool:
        """Follow the running servers and, every few seconds, what was missing; return whether anything changed.

        May block on slow file systems. An event loop asks `due`, runs `survey` in a thread, and then calls `apply`.
        """
        return self.due() and self.apply(self.survey())

    def due(self) -> bool:
        """Return whether servers came or went, or it is time to look for what was missing; reads memory alone."""
        if self._servers is None or self._starts(self._discover()) != self._starts(self._servers):
            return True
        return bool(self._missing) and time.monotonic() - self._looked >= self._interval

    def survey(self) -> Survey:
        """Look for servers, keys, tokens and weights that are new or were missing; in any thread, changes nothing."""
        servers = tuple(sorted(self._discover(), key=lambda server: server.start))
        known, missing = self.claims.keys(), self._missing
        if self._servers is not None and self._starts(servers) == self._starts(self._servers):
            deployments, sought = None, [each for each in self.deployments if each.id in missing]
        else:
            deployments = build_deployments(self.config, servers, self.policy)
            sought = [each for each in deployments if each.id not in known and each.id not in missing]
        return Survey(servers, deployments, [(each, self._look(each, False, servers)) for each in sought])

    def apply(self, survey: Survey) -> bool:
        """Take over what was found; return whether anything changed."""
        self._looked, changed = time.monotonic(), survey.deployments is not None
        if survey.deployments is not None:
            self._servers, self.deployments, self._informed = survey.servers, survey.deployments, False
            alive = {deployment.id for deployment in self.deployments}
            for known in (self.credentials, self.claims, self._missing):
                for gone in set(known) - alive:
                    del known[gone]
        for deployment, found in survey.found:
            # One that has expired is the one that could not be exchanged; every further try would block a request.
            if deployment.id in self._missing and not isinstance(found, str) and found.ends_within(0):
                continue
            changed |= self.note(deployment, found) is not None
        return changed

    @staticmethod
    def _starts(servers: Iterable[Endpoint]) -> list[str]:
        return sorted(server.start for server in servers)

    def look(self, deployment: Deployment, *, exchange: bool = True) -> Credential | str:
        """Look for what the deployment needs to be asked; return its credential, or why there is none.

        In any thread; changes nothing. With `exchange`, a short-lived token may be fetched, which blocks.
        """
        return self._look(deployment, exchange, self._servers or ())

    def note(self, deployment: Deployment, found: Credential | str) -> Credential | None:
        """Take over what `look` found; return the credential, or None where there is none."""
        if isinstance(found, str):
            self.credentials.pop(deployment.id, None)
            self._missing[deployment.id] = (
                "keyless" if deployment.provider.type == "api" else "absent",
                found,
            )
            return None
        self._missing.pop(deployment.id, None)
        self.credentials[deployment.id] = found
        self.claims[deployment.id] = Claim(deployment.scope, deployment.limits, cooling_keys(deployment, found))
        return found

    def _look(self, deployment: Deployment, exchange: bool, servers: Sequence[Endpoint]) -> Credential | str:
        if deployment.embedded and not deployment.base_url:  # a drill gives it one
            model = self.config.models[deployment.model]
            weights = embedded.ready(model, self.state)
            return weights if isinstance(weights, str) else embedded.server(model, weights, start=exchange)
        if deployment.provider.type == "local" and deployment.base_url is None:
            return f"no server is up: biollm up {deployment.model}"
        if deployment.start:
            server = next((server for server in servers if server.start == deployment.start), None)
            if server is None:
                return "its server has left"
            try:
                return Credential(endpoints.read_key(server))
            except (OSError, ValueError) as error:  # its record still counts for some seconds after the key has gone
                return f"the key of the server on {server.host} cannot be read: {error}"
        found = credentials.find(deployment.provider, deployment.account, self.state, exchange=exchange)
        url = "" if isinstance(found, str) or not found.secret else found.base_url or deployment.base_url or ""
        return in_the_clear(url, self.config.cluster.local_hosts) or found

    def claim(self, deployment: Deployment, requirements: Requirements) -> Claim:
        """Return the deployment's claim on the ledger, with what such a request is expected to use at most.

        The prompt has an upper bound; the answer is taken to be as long as the deployment's usually are, for an agent
        asks for 64,000 tokens and uses 500.
        """
        claim = self.claims[deployment.id]
        kinds = {limit.kind for limit in claim.limits}
        if not kinds & {"tokens", "usd"}:
            return claim
        typical = self.ledger.typical(deployment.id)
        expected = Usage(requirements.prompt_most, min(typical, allowance(deployment, requirements) or typical))
        usd = 0.0
        if "usd" in kinds:
            from biollm.routing import pricing

            price = pricing.price(deployment, self.config)
            usd = price.usd(expected) if price else 0.0
        return replace(claim, tokens=expected.total_tokens, usd=usd)

    def missing(self, deployment: Deployment) -> str:
        """Return what the deployment lacks to be asked at all, one sentence; empty when nothing."""
        return self._missing.get(deployment.id, ("", ""))[1]

    def candidates(self, requirements: Requirements, *, skip: Iterable[str] = ()) -> list[Candidate]:
        """Return how each deployment asked for stands, in waterfall order, but those in `skip`."""
        asks = requirements.media or (requirements.answer or 0) > LEAST_ANSWER
        if asks and not self._informed:  # reading the map takes 50 ms
            self.deployments, self._informed = _informed(self.deployments), True
        blocked, now = self.ledger.blocked(), time.time()
        found: list[tuple[Deployment, Cost | None]] = [(deployment, None) for deployment in self.deployments]
        if self.config.policy == "cheapest":
            from biollm.routing import pricing

            found = pricing.cheapest(self.deployments, requirements, self.config)
        rungs: list[Candidate] = []
        for deployment, cost in found:
            if deployment.id not in skip and asked_for(deployment, requirements):
                candidate = self._stand(deployment, requirements, blocked, now)
                rungs.append(replace(candidate, cost=cost) if cost else candidate)
        return rungs

    def _stand(self, deployment: Deployment, requirements: Requirements, blocked: Any, now: float) -> Candidate:
        if missing := self._missing.get(deployment.id):
            return Candidate(deployment, *missing)
        if reason := ineligible_reason(deployment, requirements):
            return Candidate(deployment, "unfit", reason)
        if requirements.media and refuses(deployment, requirements.media):
            return Candidate(deployment, "unfit", f"refused {' and '.join(sorted(requirements.media))} before")
        if blocked:
            claim = self.claims[deployment.id]
            for key in (*claim.cooling, f"scope:{claim.scope}"):
                if (found := blocked.get(key)) and found.until > now:
                    status = "refused" if key.startswith("key:") else "limited"
                    of = (
                        ""
                        if key.startswith("scope:")
                        else " (time given by the provider)"
                        if found.stated
                        else " (time estimated)"
                    )
                    return Candidate(deployment, status, found.reason + of, found.until, stated=found.stated)
        return Candidate(deployment, "ready")


def _informed(found: Iterable[Deployment]) -> list[Deployment]:
    """Return the deployments with what LiteLLM's map says of them."""
    # Copilot's deployments go to LiteLLM as OpenAI's; the map may list a model under either.
    asked: dict[str, tuple[str, str, str]] = {}
    for each in found:
        if each.provider.type == "api":
            prefix, _, model = each.litellm_model.partition("/")
            asked[each.id] = (each.provider.litellm_provider, prefix, model)
    facts = _facts(frozenset(asked.values()))
    return [informed(each, facts[asked[each.id]] if each.id in asked else {}) for each in found]


@cache
def _facts(asked: frozenset[tuple[str, str, str]]) -> dict[tuple[str, str, str], Mapping[str, object]]:
    """Return what LiteLLM's map says of (provider, prefix, model); the map is large, so only that is kept."""
    from biollm.routing.pricing import listed, price_map

    known = price_map()
    return {key: listed(known, key[0], key[2])[1] or listed(known, key[1], key[2])[1] for key in asked}


def note_refusal(deployment: Deployment, media: frozenset[str]) -> None:
    """Remember that this model refused a request for holding such media."""
    if media:  # of a request with nothing but text the refusal says nothing
        _refused[deployment.provider.name, deployment.model, media] = time.monotonic()


def refuses(deployment: Deployment, media: frozenset[str]) -> bool:
    """Return whether this model refused a request with these media, or fewer, within the last hour."""
    since, place = time.monotonic() - _REMEMBERED, (deployment.provider.name, deployment.model)
    return any(at > since and known[:2] == place and known[2] <= media for known, at in _refused.items())


def cooling_keys(deployment: Deployment, credential: Credential) -> tuple[str, ...]:
    """Return the ledger's keys of which each, while it cools, keeps the deployment from serving."""
    keys = [f"account:{deployment.scope}", f"endpoint:{deployment.endpoint}", f"deployment:{deployment.id}"]
    if credential.fingerprint:  # of this account: the same word may be a good key elsewhere
        keys.append(f"key:{deployment.provider.name}/{deployment.account.name}:{credential.fingerprint}")
    return tuple(keys)


def check_names(config: Config, provider: str | None, model: str | None) -> None:
    """Refuse a forced provider or model that is not configured.

    Raises:
        UnknownNameError: It lists those that are.
    """
    if provider is not None:
        config.provider(provider)
    if model is not None:
        among = [p for p in config.providers if provider in (None, p.name)]
        names = [name for each in among for name in models_of(config, each)]
        if model not in names:
            raise UnknownNameError("model", model, names)


def explain(rungs: DeploymentPool, requirements: Requirements) -> Sequence[Candidate]:
    """Return every deployment with how it stands now, quotas counted freshly; nothing is sent."""
    rungs.refresh()
    rungs.ledger.refresh()
    found = rungs.candidates(requirements)
    fresh: list[Candidate] = []
    for candidate in found:
        if candidate.status == "ready":
            used = rungs.ledger.used(candidate.deployment.scope, candidate.deployment.limits)
            claim = rungs.claim(candidate.deployment, requirements)
            full = [(limit, resets) for limit, count, resets in used if quotas.excess(limit, count, claim) > 0]
            if full:
                candidate = replace(
                    candidate, status="limited", reason=f"{full[0][0]} is used up", until=full[0][1] or 0.0
                )
        fresh.append(candidate)
    return fresh
