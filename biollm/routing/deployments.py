"""Turns the configuration and the running servers into deployments: one for each place that may answer.

Pure: nothing is read or sent. LiteLLM's deployments have `order`, `rpm` and a model group. They have no account whose
limits several deployments share, no data policy, and no facts to check a request against; a Deployment adds those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from biollm._ownership import is_local
from biollm.types import DataPolicy

if TYPE_CHECKING:
    from biollm.config import Account, Config, Limit, Model, Provider
    from biollm.slurm.endpoints import Endpoint

LEAST_ANSWER = 2048  # tokens; where fewer can be had, and more were wanted, the next deployment is asked
LEAST_EXCERPT = 200  # tokens of attachments without which a deployment is not asked
WHOLE = 50_000_000  # tokens: more than any attachment keeps
EMBEDDED_EXCERPT = 300  # tokens of attachments for the embedded model, which reads about 100 a second
_UNKNOWN_CONTEXT = 32_768  # tokens, where the configuration says nothing
LOWER, UPPER = 0.75, 1.3  # bounds of a prompt's tokens beside their estimate
_SHARE = 0.75  # of the room for attachments that is used: their tokens are an estimate

# Providers whose API takes a JSON Schema (`response_format: json_schema`); elsewhere the schema goes into the prompt.
_TAKES_SCHEMA = {"openai", "azure", "gemini", "vertex_ai", "anthropic", "mistral", "groq", "hosted_vllm"}
# A deployment's own address, so that no OPENAI_BASE_URL of the environment sends a key elsewhere.
_DEFAULT_URL = {"openai": "https://api.openai.com/v1"}
_STREAM, _REASONING_STREAM, _NO_LIMIT = 12.0, 60.0, 86400.0  # seconds


@dataclass(frozen=True)
class Deployment:
    """A model at an account or at a running server.

    Attributes:
        id: "provider/model", "provider.account/model" where a provider has several accounts, "#start" appended
            for a discovered server.
        order: Place in the waterfall, from 1; accounts and replicas of one model share it.
        scope: What its limits belong to: the account, or the account and model where limits are per model.
        local: True when nothing leaves the cluster.
        free: True when a token costs nothing (free tier, local, embedded).
        trains: True when the provider may train on prompts.
        context_length: Tokens of prompt and answer together, or None when unknown.
        max_output: Tokens of the longest answer, or None when unknown.
        vision: Whether it takes images, or None when unknown.
        fim: The model's tokens around the prefix, suffix and middle of code to fill in.
        start: The running server's start id, or "" for a configured address.
    """

    id: str
    provider: Provider = field(repr=False)
    account: Account = field(repr=False)
    model: str
    order: int
    litellm_model: str
    base_url: str | None
    scope: str
    limits: tuple[Limit, ...] = ()
    local: bool = False
    free: bool = False
    trains: bool = False
    json_schema: bool = False
    tools: bool = True
    context_length: int | None = None
    max_output: int | None = None
    vision: bool | None = None
    capabilities: frozenset[str] | None = None
    fim: tuple[str, str, str] | None = None
    start: str = ""

    @property
    def embedded(self) -> bool:
        """Return whether the model runs in this process."""
        return self.provider.type == "embedded"

    @property
    def host(self) -> str:
        """Return the host's name; "" where only LiteLLM knows it."""
        return urlsplit(self.base_url or "").hostname or ""

    @property
    def endpoint(self) -> str:
        """Return what a network failure affects: a server's start, a URL, or the provider's default address."""
        return self.start or self.base_url or self.provider.name


@dataclass(frozen=True)
class Requirements:
    """What a request asks of the deployment that serves it.

    Attributes:
        prompt: The prompt's tokens, a lower bound; `prompt_most`: an upper one.
        answer: The most tokens that the answer may have; None where the request does not say.
        attached: Estimated tokens of the attachments before they are condensed; they are not part of `prompt`.
        allow_degraded: Whether the embedded model may answer; None if its provider or model is named.
        media: What the prompt holds besides text: "images", "audio", "files", "videos".
    """

    provider: str | None = None
    model: str | None = None
    deployment: str | None = None
    policy: DataPolicy = "any"
    tools: bool = False
    capability: str | None = None
    prompt: int = 0
    prompt_most: int = 0
    answer: int | None = None
    attached: int = 0
    media: frozenset[str] = frozenset()
    allow_degraded: bool | None = True
    fim: bool = False
    raw: bool = False


def build_deployments(
    config: Config, endpoints: Iterable[Endpoint] = (), policy: DataPolicy | None = None
) -> list[Deployment]:
    """Return every deployment in waterfall order; under a local_only policy, the local ones alone.

    A local model without a server is included, without an address, so that it can be explained.
    """
    running = list(endpoints)
    models = [(provider, name) for provider in config.providers for name in models_of(config, provider)]
    found = [
        deployment
        for order, (provider, name) in enumerate(models, 1)
        for deployment in _of_model(
            config, provider, name, order, [each for each in running if name in (each.model, *each.adapters)]
        )
    ]
    local_only = (policy or config.data_policy) == "local_only"
    return [deployment for deployment in found if deployment.local or not local_only]


def models_of(config: Config, provider: Provider) -> list[str]:
    """Return the provider's models in their order: by `priority` of their own, then by place in the list.

    Local models that no provider lists belong to the first local provider without a fixed address, after its own;
    embedded ones to the first embedded provider, before its own: they were added for being better.
    """
    names = list(provider.models)
    if provider == next((p for p in config.providers if p.type == "embedded"), None):
        names = [*_unlisted(config, "embedded"), *names]
    if provider == next((p for p in config.providers if p.type == "local" and not p.base_url), None):
        names += _unlisted(config, "local")

    def rank(name: str) -> float:
        own = config.models[name].priority if name in config.models else None
        return float("inf") if own is None else own

    return sorted(names, key=rank)


def _unlisted(config: Config, kind: str) -> list[str]:
    listed = {name for each in config.providers for name in each.models}
    return [key for key, model in config.models.items() if model.type == kind and key not in listed]


def _of_model(
    config: Config, provider: Provider, name: str, order: int, endpoints: Sequence[Endpoint]
) -> Iterable[Deployment]:
    model, several, served = config.models.get(name), len(provider.accounts) > 1, provider.type == "local"
    places: list[tuple[str, Account, Endpoint | None]] = []
    if not served or provider.base_url or not endpoints:
        for account in provider.accounts:
            account_id = f"{provider.name}.{account.name}" if several else provider.name
            places.append((f"{account_id}/{name}", account, None))
    if served:
        places += [(f"{provider.name}/{name}#{e.start[:8]}", provider.accounts[0], e) for e in endpoints]
    # LiteLLM's github_copilot keeps one login for all; its API is OpenAI's, so each account is sent there with its own.
    prefix = "openai" if provider.litellm_provider == "github_copilot" else provider.litellm_provider
    for ident, account, endpoint in places:
        base_url = endpoint.base_url if endpoint else provider.base_url or _DEFAULT_URL.get(provider.litellm_provider)
        on_cluster = provider.type == "embedded" or endpoint is not None or (served and not base_url)
        local = on_cluster or is_local(base_url, config.cluster.local_hosts)
        scope = f"{provider.name}/{account.name}"
        yield Deployment(
            id=ident,
            provider=provider,
            account=account,
            model=name,
            order=order,
            litellm_model=f"{prefix}/{name if endpoint else provider.model_ids.get(name, name)}",
            base_url=base_url,
            scope=f"{scope}:{name}" if provider.limits_per == "model" else scope,
            limits=account.limits,
            local=local,
            free=provider.free_tier or (local and provider.type != "api"),  # which may pass it on
            trains=provider.trains_on_prompts,
            json_schema=_first(model and model.json_schema, provider.json_schema, _takes_schema(provider)),
            tools=_first(model and model.tools, provider.tools, _takes_tools(provider, model)),
            context_length=model and (model.served_context if served else model.context_length),
            vision=model and model.vision,
            capabilities=model and model.capabilities,
            fim=model.fim if model and served else None,
            start=endpoint.start if endpoint else "",
        )


def _first(*choices: bool | None) -> bool:
    return next(choice for choice in choices if choice is not None)


def _takes_schema(provider: Provider) -> bool:
    if provider.litellm_provider == "openai" and provider.base_url:
        return False  # another company's version of OpenAI's API
    return provider.type == "embedded" or provider.litellm_provider in _TAKES_SCHEMA


def _takes_tools(provider: Provider, model: Model | None) -> bool:
    """Return the default: vLLM answers tool requests only with a parser, and the embedded model drops tools silently."""
    if provider.type == "local":
        return model is None or "tool_call_parser" in model.vllm_args
    return provider.type == "api"


def ineligible_reason(deployment: Deployment, requirements: Requirements) -> str | None:
    """Return why `deployment` is not eligible for such a request, one sentence, or None."""
    if requirements.policy == "local_only" and not deployment.local:
        return "the data policy is local_only and this deployment is not local"
    if requirements.policy == "no_training" and deployment.trains:
        return "the provider may train on prompts and the data policy is no_training"
    named = requirements.allow_degraded is None and (requirements.provider or requirements.model)
    if deployment.embedded and not (requirements.allow_degraded or named):
        return "the embedded model gives degraded answers, which this request does not allow (allow_degraded)"
    if requirements.tools and not deployment.tools:
        return "does not support tools"
    if "images" in requirements.media and deployment.vision is False:
        return "does not support images"
    if requirements.media and deployment.embedded:
        return "supports text only"
    if requirements.fim and not deployment.fim:
        return "does not support fill-in-the-middle"
    if requirements.raw and deployment.provider.type != "local":
        return "supports chat messages only, not plain text"
    if requirements.capability and requirements.capability not in (deployment.capabilities or ()):
        return f"lacks the capability {requirements.capability!r}"
    if reason := too_long(deployment, requirements):
        return reason
    if deployment.max_output and min(requirements.answer or 0, LEAST_ANSWER) > deployment.max_output:
        return f"answers with at most {deployment.max_output} tokens"
    return None


def too_long(deployment: Deployment, requirements: Requirements) -> str | None:
    """Return that the prompt with a short answer exceeds the deployment's context, one sentence, or None."""
    excerpt = min(requirements.attached, LEAST_EXCERPT)
    least = requirements.prompt + excerpt + min(requirements.answer or 0, LEAST_ANSWER)
    if deployment.context_length and least > deployment.context_length:
        return f"needs about {least} tokens, its context is {deployment.context_length}"
    return None


def central(requirements: Requirements) -> int:
    """Return the estimate between the bounds of the prompt's tokens."""
    return round(requirements.prompt / LOWER)


def excerpt_size(deployment: Deployment, requirements: Requirements) -> int:
    """Return the estimated tokens of attachments that the deployment is sent at most.

    They fit its context beside the question and an answer, and any limit of tokens that its account has.
    """
    if deployment.embedded or not requirements.attached:
        return min(requirements.attached, EMBEDDED_EXCERPT)
    context = deployment.context_length or _UNKNOWN_CONTEXT
    answer = min(LEAST_ANSWER if requirements.answer is None else requirements.answer, context // 2)
    limits = [limit.amount for limit in deployment.limits if limit.kind == "tokens"]
    room = _SHARE * (min([context, *limits]) - answer - requirements.prompt_most)
    return min(requirements.attached, max(LEAST_EXCERPT, int(room)))


def most_sent(deployment: Deployment, requirements: Requirements) -> int:
    """Return the most tokens that the deployment is sent: the prompt and its excerpt of the attachments."""
    return requirements.prompt_most + excerpt_size(deployment, requirements)


def allowance(deployment: Deployment, requirements: Requirements) -> int | None:
    """Return how many tokens of an answer to ask for: as many as wanted and possible; None where nothing is said.

    What is left beside the prompt is an estimate, so it is never fewer than `LEAST_ANSWER`, or what was wanted.
    """
    if requirements.answer is None:
        return None
    left = deployment.context_length and max(
        LEAST_ANSWER, deployment.context_length - most_sent(deployment, requirements)
    )
    return min(size for size in (requirements.answer, left, deployment.max_output) if size)


def informed(deployment: Deployment, facts: Mapping[str, object]) -> Deployment:
    """Return `deployment` with what LiteLLM's map of models says of it."""
    most, sees, context = (facts.get(name) for name in ("max_output_tokens", "supports_vision", "max_input_tokens"))
    context = deployment.context_length or (context if isinstance(context, int) else None)
    vision = sees if deployment.vision is None and isinstance(sees, bool) else deployment.vision
    most = most if isinstance(most, int) else None
    return replace(deployment, context_length=context, max_output=most, vision=vision)


def asked_for(deployment: Deployment, requirements: Requirements) -> bool:
    """Return whether the request leaves the choice open, or names this provider, model or deployment."""
    return (
        requirements.provider in (None, deployment.provider.name)
        and requirements.model in (None, deployment.model)
        and requirements.deployment in (None, deployment.id)
    )


def attempt_timeout(deployment: Deployment, config: Config, *, stream: bool) -> float:
    """Return the seconds that an attempt may take; of a stream, to its first content and between its chunks.

    A cloud stream has 12 s, 60 s where the model reasons, for that is silent, unless the configuration says otherwise.
    The embedded model needs as long as it needs.
    """
    if stream and deployment.embedded:
        return _NO_LIMIT
    if stream and not deployment.provider.timeout and deployment.provider.type == "api":
        reasons = "reasoning" in (deployment.capabilities or ())
        return config.routing.stream_timeout or (_REASONING_STREAM if reasons else _STREAM)
    return deployment.provider.timeout or config.routing.timeout
