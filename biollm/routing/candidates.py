"""Which deployments may serve a request now, and why each of the others may not. Sends nothing.

The pool holds the deployments of one configuration with what each needs: a key, a claim on the ledger, weights.
`explain` reports from it, the waterfall routes by it. LiteLLM's Router knows nothing but its own cooldowns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    WHOLE,
    Deployment,
    Requirements,
    allowance,
    asked_for,
    build_deployments,
    excerpt_size,
    ineligible_reason,
    models_of,
    most_sent,
    too_long,
)
from biollm.routing.router_config import GROUP, LOCAL_GROUP
from biollm.slurm import endpoints
from biollm.types import DataPolicy, Usage

if TYPE_CHECKING:
    from biollm.ledger.quotas import Cooldown
    from biollm.routing.pricing import Cost
    from biollm.slurm.endpoints import Endpoint, Figures

_REMEMBERED = 3600.0  # seconds that this process remembers a model's refusal of images
_refused: dict[tuple[str, str, frozenset[str]], float] = {}

Status = Literal["ready", "limited", "cooling", "refused", "keyless", "unfit", "absent"]
_LIMITS = ("limited", "credit")  # failures that are limits of the provider's


@dataclass(frozen=True)
class Load:
    """The load of a replica.

    Attributes:
        own: Requests of this process in flight there.
        others: Those of other clients. A server without metrics counts as the busiest of the others, so that it is
            not preferred.
        cache: Share of its key-value cache in use.
        told: The server's figures, or None where it has no metrics.
    """

    own: int
    others: int
    cache: float
    told: Figures | None

    @property
    def rank(self) -> tuple[int, float]:
        """Return a key that sorts the least busy first: requests, then the share of the cache in tenths."""
        return self.own + self.others, round(self.cache, 1)

    def __str__(self) -> str:
        total = f"{self.own} of this process = {self.own + self.others} in flight"
        if self.told:
            figures = f"{self.told.running} running, {self.told.waiting} waiting, cache {self.told.cache:.0%}"
            return f"{self.others} of others + {total} ({figures})"
        return (
            f"{self.others} assumed + {total} (no metrics)" if self.others else f"{self.own} of this process in flight"
        )


@dataclass(frozen=True)
class Candidate:
    """A deployment and its status.

    Attributes:
        status: "ready"; "limited" (at a limit, the configured or the provider's) or "cooling" (on cooldown after a failure), both until
            `until`; "refused" (its key was refused);
            "keyless" (no key); "unfit" (not eligible for this request); "absent" (no server, no weights).
        reason: One sentence; empty when ready.
        until: Epoch seconds at which a limited deployment is available again.
        cost: Expected cost of its answer, under `policy: cheapest`.
        load: Its load, where it is one of several ready replicas and they were polled.
        too_long: Whether its context is too small for the prompt.
        stated: Whether a limit or the provider names the time `until`; else it is an estimate.
    """

    deployment: Deployment
    status: Status
    reason: str = ""
    until: float = 0.0
    cost: Cost | None = None
    load: Load | None = None
    stated: bool = True
    too_long: bool = False


@dataclass(frozen=True)
class Survey:
    """The servers and credentials found by a look; `deployments` is None where the servers are the same as before.

    Attributes:
        found: The credential of each deployment that is new or lacked one, or why there is none.
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
        settle: Waits for at most so many seconds until `discover` knows the servers; returns whether it does.
        interval: Seconds between two looks for what a deployment lacks.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        state: Path,
        policy: DataPolicy,
        discover: Callable[[], Iterable[Endpoint]] = tuple,
        settle: Callable[[float], bool] = lambda _: True,
        *,
        interval: float = 5.0,
    ) -> None:
        self.config, self.ledger, self.state = config, ledger, state
        self.policy: DataPolicy = policy
        self._discover, self.settle, self._interval = discover, settle, interval
        self._servers: tuple[Endpoint, ...] | None = None
        self._looked = 0.0
        self.deployments: list[Deployment] = []
        self.credentials: dict[str, Credential] = {}
        self.claims: dict[str, Claim] = {}
        self._informed = False
        self._missing: dict[str, tuple[Status, str]] = {}

    def refresh(self) -> bool:
        """Follow the running servers and, every few seconds, look for what was missing; return whether anything changed.

        May block on slow file systems. An event loop calls `due`, then `survey` in a thread, then `apply`.
        """
        return self.due() and self.apply(self.survey())

    def due(self) -> bool:
        """Return whether servers came or went, or it is time to look for what was missing; reads memory alone."""
        if self._servers is None or _starts(self._discover()) != _starts(self._servers):
            return True
        return bool(self._missing) and time.monotonic() - self._looked >= self._interval

    def survey(self) -> Survey:
        """Look for servers, keys, tokens and weights that are new or were missing; in any thread, changes nothing."""
        servers = tuple(sorted(self._discover(), key=lambda server: server.start))
        if self._servers is not None and _starts(servers) == _starts(self._servers):
            deployments, wanted = None, [each for each in self.deployments if each.id in self._missing]
        else:
            deployments = build_deployments(self.config, servers, self.policy)
            wanted = [each for each in deployments if each.id not in self.claims and each.id not in self._missing]
        return Survey(servers, deployments, [(each, self._look(each, False, servers)) for each in wanted])

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

    def look(self, deployment: Deployment) -> Credential | str:
        """Return the deployment's credential, or why there is none; in any thread, changes nothing.

        May fetch a short-lived token, which blocks.
        """
        return self._look(deployment, True, self._servers or ())

    def note(self, deployment: Deployment, found: Credential | str) -> Credential | None:
        """Take over what `look` found; return the credential, or None where there is none."""
        if isinstance(found, str):
            self.credentials.pop(deployment.id, None)
            self._missing[deployment.id] = ("keyless" if deployment.provider.type == "api" else "absent", found)
            return None
        self._missing.pop(deployment.id, None)
        self.credentials[deployment.id] = found
        self.claims[deployment.id] = Claim(deployment.scope, deployment.limits, cooling_keys(deployment, found))
        return found

    def _look(self, deployment: Deployment, exchange: bool, servers: Sequence[Endpoint]) -> Credential | str:
        if deployment.embedded:
            model = self.config.models[deployment.model]
            weights = embedded.ready(model, self.state)
            return weights if isinstance(weights, str) else embedded.server(model, weights, start=exchange)
        if deployment.provider.type == "local" and deployment.base_url is None:
            known = self.settle(0)
            return f"no server is up: biollm up {deployment.model}" if known else "the run directory does not answer"
        if deployment.start:
            server = next((server for server in servers if server.start == deployment.start), None)
            if server is None:
                return "its server has stopped"
            try:
                return Credential(endpoints.read_key(server))
            except (OSError, ValueError) as error:  # its record still counts for some seconds after the key has gone
                return f"the key of the server on {server.host} cannot be read: {error}"
        found = credentials.find(deployment.provider, deployment.account, self.state, exchange=exchange)
        url = "" if isinstance(found, str) else found.base_url or deployment.base_url or ""
        return in_the_clear(url, self.config.cluster.local_hosts) or found

    def claim(self, deployment: Deployment, requirements: Requirements) -> Claim:
        """Return the deployment's claim on the ledger, with what such a request is expected to use at most.

        The prompt has an upper bound; the answer is assumed to be as long as the deployment's usually are, since an
        agent asks for 64,000 tokens and uses 500.
        """
        claim, requirements = self.claims[deployment.id], self.sized(deployment, requirements)
        kinds = {limit.kind for limit in claim.limits}
        if not kinds & {"tokens", "usd"}:
            return claim
        typical = self.ledger.typical(deployment.id)
        prompt = most_sent(deployment, requirements)
        expected = Usage(prompt, min(typical, allowance(deployment, requirements) or typical))
        usd = 0.0
        if "usd" in kinds:
            from biollm.routing.pricing import price

            known = price(deployment, self.config)
            usd = known.usd(expected) if known else 0.0
        return replace(claim, tokens=expected.total_tokens, usd=usd)

    def sized(self, deployment: Deployment, requirements: Requirements) -> Requirements:
        """Return `requirements` with its tokens as this model counts them, as far as that has been learned."""
        if (ratio := self.ledger.token_ratio(deployment.model)) == 1:
            return requirements
        sizes = {name: round(getattr(requirements, name) * ratio) for name in ("prompt", "prompt_most", "attached")}
        return replace(requirements, **sizes)

    def excerpt(self, deployment: Deployment, requirements: Requirements) -> int:
        """Return the tokens of attachments that fit the deployment, as they are estimated without a ratio."""
        sized = self.sized(deployment, requirements)
        sent = excerpt_size(deployment, sized)
        if sent == sized.attached:  # all of them; no rounding may cut a line
            return WHOLE
        return int(sent / self.ledger.token_ratio(deployment.model))

    def missing(self, deployment: Deployment) -> str:
        """Return what the deployment lacks to be asked at all, one sentence; empty when nothing."""
        return self._missing.get(deployment.id, ("", ""))[1]

    def candidates(self, requirements: Requirements, *, skip: Iterable[str] = ()) -> list[Candidate]:
        """Return the deployments that the request may name, in waterfall order, with their status; not those in `skip`."""
        by_map = requirements.media or requirements.attached or (requirements.answer or 0) > LEAST_ANSWER
        if by_map and not self._informed:  # reading the map takes 50 ms
            from biollm.routing.pricing import with_facts

            self.deployments, self._informed = with_facts(self.deployments), True
        now, blocked = time.time(), self.ledger.blocked()
        priced: list[tuple[Deployment, Cost | None]] = [(deployment, None) for deployment in self.deployments]
        if self.config.routing.policy == "cheapest":
            from biollm.routing.pricing import cheapest

            priced = cheapest(self.deployments, requirements, self.config)
        found: list[Candidate] = []
        for deployment, cost in priced:
            if deployment.id not in skip and asked_for(deployment, requirements):
                candidate = self._candidate(deployment, requirements, blocked, now)
                found.append(replace(candidate, cost=cost) if cost else candidate)
        return found

    def _candidate(
        self, deployment: Deployment, requirements: Requirements, blocked: Mapping[str, Cooldown], now: float
    ) -> Candidate:
        requirements = self.sized(deployment, requirements)
        if reason := ineligible_reason(deployment, requirements):  # first: no key would help
            return Candidate(deployment, "unfit", reason, too_long=reason == too_long(deployment, requirements))
        if missing := self._missing.get(deployment.id):
            return Candidate(deployment, *missing)
        if requirements.media and refuses(deployment, requirements.media):
            return Candidate(deployment, "unfit", f"refused {' and '.join(sorted(requirements.media))} before")
        if blocked:
            claim = self.claims[deployment.id]
            for key in (*claim.cooling, f"scope:{claim.scope}"):
                cooldown = blocked.get(key)
                if cooldown and cooldown.until > now:
                    source = "given by the provider" if cooldown.stated else "estimated"
                    reason = cooldown.reason + ("" if key.startswith("scope:") else f" (time {source})")
                    return Candidate(
                        deployment, blocked_status(key, cooldown), reason, cooldown.until, stated=cooldown.stated
                    )
        return Candidate(deployment, "ready")


def blocked_status(key: str, cooldown: Cooldown | None) -> Status:
    """Return the status of a deployment that a key of the ledger blocks."""
    if key.startswith("key:"):
        return "refused"
    return "limited" if key.startswith("scope:") or (cooldown and cooldown.kind in _LIMITS) else "cooling"


def _starts(servers: Iterable[Endpoint]) -> list[str]:
    return sorted(server.start for server in servers)


def note_refusal(deployment: Deployment, media: frozenset[str]) -> None:
    """Remember that this model refused a request because of such media."""
    if media:  # the refusal of a text says nothing about media
        _refused[deployment.provider.name, deployment.model, media] = time.monotonic()


def refuses(deployment: Deployment, media: frozenset[str]) -> bool:
    """Return whether this model refused a request with these media, or fewer, within the last hour."""
    since, place = time.monotonic() - _REMEMBERED, (deployment.provider.name, deployment.model)
    return any(at > since and known[:2] == place and known[2] <= media for known, at in _refused.copy().items())


def cooling_keys(deployment: Deployment, credential: Credential) -> tuple[str, ...]:
    """Return the ledger's keys that put the deployment on cooldown."""
    keys = [f"account:{deployment.scope}", f"endpoint:{deployment.endpoint}", f"deployment:{deployment.id}"]
    if credential.fingerprint:  # of this account at this address: the same key may be valid elsewhere
        place = f"{deployment.provider.name}/{deployment.account.name}@{deployment.endpoint}"
        keys.append(f"key:{place}:{credential.fingerprint}")
    return tuple(keys)


def address(config: Config, name: str) -> dict[str, Any]:
    """Return the options that `model` stands for: the waterfall, its local part, "provider/model", or a model."""
    if name in (GROUP, LOCAL_GROUP):
        return {"local_only": True} if name == LOCAL_GROUP else {}
    provider, _, model = name.partition("/")
    whole = any(name in models_of(config, each) for each in config.providers)
    if model and not whole and any(each.name == provider for each in config.providers):
        return {"provider": provider, "model": model}
    return {"model": name}


def check_names(config: Config, provider: str | None, model: str | None) -> tuple[str | None, str | None]:
    """Return a forced provider and model, "provider/model" taken apart; refuse those that are not configured.

    Raises:
        UnknownNameError: It lists those that are.
    """
    if model and (named := address(config, model).get("provider")) and provider in (None, named):
        provider, model = named, model.removeprefix(f"{named}/")
    if provider is not None:
        config.provider(provider)
    if model is not None:
        among = [p for p in config.providers if provider in (None, p.name)]
        names = [name for each in among for name in models_of(config, each)]
        if model not in names:
            raise UnknownNameError("model", model, names)
    return provider, model


def explain(pool: DeploymentPool, requirements: Requirements) -> Sequence[Candidate]:
    """Return every deployment with its status, quotas counted anew; nothing is sent."""
    pool.refresh()
    pool.ledger.refresh()
    return [_counted(pool, candidate, requirements) for candidate in pool.candidates(requirements)]


def _counted(pool: DeploymentPool, candidate: Candidate, requirements: Requirements) -> Candidate:
    """Return the candidate, limited where a limit of its account has no room for the request."""
    if candidate.status == "ready":
        deployment = candidate.deployment
        claim = pool.claim(deployment, requirements)
        for limit, used, resets in pool.ledger.used(deployment.scope, deployment.limits):
            if quotas.excess(limit, used, claim) > 0:
                return replace(candidate, status="limited", reason=f"{limit} is used up", until=resets or 0.0)
    return candidate
