"""The values of models.yaml, providers.yaml and cluster.yaml: frozen, each checked by itself.

LiteLLM's own configuration has no accounts with budgets and no Slurm site, and it ignores a misspelt key.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from biollm.config import values
from biollm.config.values import Limit
from biollm.errors import UsageError, nearest
from biollm.types import DataPolicy

# Providers whose name is LiteLLM's prefix; others need a base_url or litellm_provider.
LITELLM_PROVIDERS = (
    "anthropic", "azure", "bedrock", "cerebras", "cohere", "databricks", "deepinfra", "deepseek", "fireworks_ai", "gemini",
    "github_copilot", "groq", "huggingface", "mistral", "moonshot", "nvidia_nim", "ollama", "openai", "openrouter",
    "perplexity", "sambanova", "together_ai", "vertex_ai", "xai",
)  # fmt: skip

_OF_SERVER = {"hf_id", "revision", "path", "gguf", "size_gb", "gpus_required", "vllm_args", "start_timeout", "idle_timeout",
              "architecture", "scale"}  # fmt: skip # what an adapter has from its base
ENTRY_NAME = {"models": "key", "providers": "name"}  # the field that an entry's name in the file gives


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Limited(_Value):
    rate_limit: values.Requests = Field(default=(), repr=False)
    token_limit: values.Tokens = Field(default=(), repr=False)
    token_budget: values.Tokens = Field(default=(), repr=False)
    budget: values.Dollars = Field(default=(), repr=False)
    resets: values.Resets = None
    share: values.Share = 1.0
    env_key: values.EnvKey = None
    key_file: values.FullPath | None = None


class Account(_Limited):
    """One key of a provider, with its limits."""

    name: values.Name = "default"

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """Return all limits, with the account's `share` of each amount."""
        return tuple(
            replace(each, amount=each.amount * self.share, resets=None if each.rolling else self.resets)
            for each in (*self.rate_limit, *self.token_limit, *self.token_budget, *self.budget)
        )


class Provider(_Limited):
    """A cloud API, this site's servers, or this process. `timeout`, `patience`, `on_refusal`: None is the routing's."""

    name: values.Name
    title: values.SingleLine = ""  # Name shown to people.
    description: str = ""
    enabled: bool = True
    type: Literal["api", "local", "embedded"]
    priority: values.Count = 50
    base_url: values.Url = None
    models: tuple[values.ModelName, ...] = ()
    model_ids: dict[str, values.SingleLine] = {}  # Our model name -> the provider's own id, where they differ.
    litellm_provider: str = ""  # LiteLLM's prefix: gemini, openai, hosted_vllm ...
    named_accounts: tuple[Account, ...] = Field(default=(), alias="accounts")
    limits_per: Literal["account", "model"] = "account"  # Whether limits are per account or per model.
    free_tier: bool = False
    trains_on_prompts: bool = False
    json_schema: bool | None = None
    tools: bool | None = None
    timeout: values.Amount | None = None  # Seconds per attempt.
    patience: values.Price | None = None
    on_refusal: Literal["stop", "next"] | None = None
    requires_gpu: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, written: dict[str, Any]) -> dict[str, Any]:
        name = written.get("name", "")
        prefix = name if name in LITELLM_PROVIDERS else "openai" if written.get("base_url") else ""
        if written.get("type") in ("local", "embedded"):
            prefix = "hosted_vllm"
        return {"title": name, "litellm_provider": prefix} | written

    @field_validator("named_accounts")
    @classmethod
    def _differ(cls, accounts: tuple[Account, ...]) -> tuple[Account, ...]:
        keys = [account.env_key or account.key_file for account in accounts if account.env_key or account.key_file]
        for what, found in (("name", [account.name for account in accounts]), ("key", keys)):
            if len(set(found)) < len(found):
                raise ValueError(f"has two accounts with one {what}.")
        return accounts

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.named_accounts and (self.env_key or self.key_file):
            raise ValueError("has accounts, and a key beside them. Write the key into an account.")
        if not self.litellm_provider:
            hint = nearest(self.name, LITELLM_PROVIDERS)
            hint = hint or "An OpenAI-compatible API needs a base_url, others litellm_provider."
            raise ValueError(f"is not a provider that LiteLLM knows by name, and has no base_url. {hint}")
        return self

    @cached_property
    def accounts(self) -> tuple[Account, ...]:
        """Return the accounts, at least one, each with the provider's key and limits where it has none."""
        common = {key: getattr(self, key) for key in self.model_fields_set & set(_Limited.model_fields)}
        listed = self.named_accounts or (Account(),)
        return tuple(Account(**common | {key: getattr(each, key) for key in each.model_fields_set}) for each in listed)


@dataclass(frozen=True)
class Architecture:
    """A model's size, from its published config.json; 0 where it does not apply."""

    parameters: values.Count  # Every expert counted.
    layers: values.Positive
    heads: values.Positive  # Query heads.
    hidden: values.Positive
    dtype: str = "bfloat16"  # As published: bfloat16, float16, fp8, int8, awq, gptq.
    weight_bytes: values.Count = 0  # Of the published checkpoint; 0 is parameters x dtype.
    kv_heads: values.Count = 0  # Sharded by tensor parallelism.
    head_dim: values.Count = 0
    kv_lora_rank: values.Count = 0  # Of multi-head latent attention, replicated on every rank with rope_dim.
    rope_dim: values.Count = 0
    intermediate: values.Count = 0  # Width of the MLP; in a mixture of experts, of an expert's.
    vocab: values.Count = 0
    experts: values.Count = 0
    quant_block: values.Count = 0  # Of block-quantised weights: intermediate / TP must be a multiple of it.
    context: values.Count = 0  # Tokens; the longest the model can.


class Scale(_Value):
    """How many servers of a model run, by demand: at least `min`, at most `max`."""

    min: values.Count = 0
    max: values.Positive = 1
    target_waiting: values.Count = 1  # Requests that may wait at each server before another one is started.

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"has a min of {self.min}, above its max of {self.max}.")
        return self


class Model(_Value):
    """One model of models.yaml."""

    key: values.ModelName  # the name in the file, and the served model name
    name: values.SingleLine = ""  # Name shown to people.
    description: str = ""
    enabled: bool = True
    type: Literal["local", "api", "embedded"] = "local"
    hf_id: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = Field(default=None, pattern=r"^\w[\w./-]*$")
    path: values.FullPath | None = None  # Folder of the weights, instead of models_dir.
    base: values.ModelName | None = None  # The model that a LoRA adapter belongs to: one server serves both.
    lora: values.FullPath | None = None  # Folder of the adapter.
    lora_rank: int = Field(default=16, ge=1, le=512)  # Rank of the adapter, `r` in its adapter_config.json.
    gguf: values.SingleLine | None = None  # A file, org/repo/file.gguf or pypi:wheel==version; #sha256= may follow.
    size_gb: values.Amount | None = None
    gpus_required: values.Count = 1
    context_length: values.Positive | None = None  # Tokens of prompt and answer together.
    capabilities: frozenset[values.Capability] | None = None  # None is unknown, and rules nothing out.
    priority: values.Count | None = None  # Place among its provider's models, before those without one.
    vllm_args: values.Flags = {}
    json_schema: bool | None = None
    tools: bool | None = None
    vision: bool | None = None  # Takes images; None is as in LiteLLM's map, and other models are tried.
    fim: tuple[str, str, str] | None = None  # Tokens before prefix, suffix and middle.
    threads: values.Positive = 1  # CPU threads of an embedded model.
    start_timeout: values.Duration = 1800  # Time until a server is ready.
    idle_timeout: values.Duration | None = None  # Time without requests until its server stops; None is the cluster's.
    architecture: Architecture | None = None
    scale: Scale | None = None  # Start and stop servers with the demand; None leaves that to you.

    @model_validator(mode="after")
    def _is_scaled_on_the_cluster(self) -> Self:
        if self.scale and self.type != "local":
            raise ValueError(f"has `scale`, but only servers of `type: local` are started: this is {self.type}.")
        return self

    @model_validator(mode="after")
    def _heads_have_a_width(self) -> Self:
        if (size := self.architecture) and not size.head_dim and not size.kv_lora_rank and size.hidden < size.heads:
            raise ValueError(f"architecture.hidden is {size.hidden}, less than its {size.heads} heads: correct one.")
        return self

    @model_validator(mode="after")
    def _adapter_has_no_server(self) -> Self:
        if bool(self.base) != bool(self.lora):
            raise ValueError("needs both `base`, a model, and `lora`, the folder of its adapter.")
        if set("=, ") & set(str(self.lora)):
            raise ValueError(f"lora: vLLM accepts no blank, comma or = in the path of an adapter: {self.lora}.")
        if self.base and (keys := self.model_fields_set & _OF_SERVER):
            raise ValueError(
                f"{' and '.join(sorted(keys))} cannot be set for an adapter: its base {self.base} is served."
            )
        return self

    @property
    def served_context(self) -> int | None:
        """Return the context length in tokens on our servers: the model's, limited by `max_model_len`."""
        known = [self.context_length]
        with suppress(UsageError):  # `biollm up` reports it
            known.append(values.token_count(self.vllm_args.get("max_model_len")))
        return min((size for size in known if size), default=None)


class Environment(_Value):
    """What makes vLLM available on a node: at most one of venv, conda and container. In `env`, None unsets."""

    modules: tuple[values.SingleLine, ...] = ()
    venv: values.FullPath | None = None
    conda: values.Expanded | None = None
    container: values.Expanded | None = None
    container_command: values.SingleLine = "apptainer"
    binds: tuple[values.Expanded, ...] = ()
    env: dict[str, values.EnvValue] = {}

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(map(bool, (self.venv, self.conda, self.container))) > 1:
            raise ValueError("has more than one of venv, conda and container. `null` takes an inherited one out.")
        return self


class Cluster(_Value):
    """The site profile. Times in seconds, GPU memory in GiB, a node's in GB. None is Slurm's default, or unlimited."""

    name: values.Name = "cluster"
    partition: values.SingleLine | None = None
    account: values.SingleLine | None = None
    qos: values.SingleLine | None = None
    constraint: values.SingleLine | None = None
    gpu_type: values.SingleLine | None = None
    gpu_memory_gib: values.Amount = 79.1
    gpus_per_node: values.Positive = 8
    cpus_per_node: values.Positive | None = None
    memory_gb_per_node: values.Positive | None = None
    exclusive: bool = False
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    walltime: values.Walltime = 8 * 3600
    environment: Environment = Environment()
    models_dir: values.FullPath | None = None
    run_dir: values.FullPath | None = None
    cache_dir: values.FullPath | None = None
    log_dir: values.FullPath | None = None
    max_jobs: values.Count | None = None
    max_gpus: values.Count | None = None
    gpu_hours_per_day: values.Price | None = None
    local_hosts: tuple[values.SingleLine, ...] = ()
    trusted_owners: tuple[values.SingleLine, ...] = ()
    idle_timeout: values.Duration = 1800
    drain: values.Duration = 120
    handover: bool = False
    max_chain: values.Positive = 2
    sbatch_options: tuple[values.SingleLine, ...] = ()


class Costs(_Value):
    """For cost reports: the model to compare with; the price of a GPU hour, and your own prices by provider, in USD."""

    reference_model: str | None = None
    gpu_hour_usd: values.Price | None = None
    per_million_tokens: dict[str, values.Price] = {}


class Alerts(_Value):
    """Alert rules, and where alerts go. A rule without a value is off; durations are in seconds."""

    budget_share: values.Share | None = None  # Used share of a daily or monthly limit in USD or tokens.
    error_rate: values.Share | None = None  # Share of requests that failed.
    fallback_rate: values.Share | None = None  # Share of requests that a later deployment than the first answered.
    p95: values.Duration | None = None  # Latency of answers.
    down: values.Duration | None = None  # How long a deployment fails or cools down without an answer.
    expires: values.Duration | None = None  # Time to the end of a server's walltime with no successor ready.
    job_failed: bool = False
    window: values.Duration = 900  # Period of the rates and of p95, which need at_least requests.
    at_least: values.Positive = 10
    stderr: bool = True
    webhook_env: values.EnvKey = None  # Holds the URL of a webhook with Slack's body.
    webhook_file: values.FullPath | None = None  # A file (0600) with that URL.
    command: tuple[values.Expanded, ...] = ()  # A program that gets JSON on stdin.

    @property
    def active(self) -> bool:
        """Return whether there is a rule."""
        limits = (self.budget_share, self.error_rate, self.fallback_rate, self.p95, self.down, self.expires)
        return self.job_failed or limits.count(None) < len(limits)


class Cache(_Value):
    """Limits of the cache of answers, which each call turns on for itself."""

    ttl: values.Duration = 7 * 86400  # How long an answer may be used again.
    max_mb: values.Amount = 200.0  # Size of the file; the oldest answers make room.


class Routing(_Value):
    """How requests are routed; times in seconds."""

    policy: Literal["order", "cheapest"] = "order"  # Within one priority: of the files, or by expected price.
    timeout: values.Amount = 60.0  # Per attempt.
    stream_timeout: values.Amount | None = None  # To a cloud stream's first content; default 12, or 60 if it reasons.
    headers_after: values.Amount = 20.0  # The gateway then begins a silent stream; before, errors have a status.
    sender: Literal["auto", "litellm"] = "auto"  # auto: the command line and the gateway send OpenAI's JSON directly.
    patience: values.Price = 0.0  # Wait for an earlier deployment at its limit before a later one is tried.
    on_refusal: Literal["stop", "next"] = "stop"  # After a refusal by content policy.
    local_timeout: values.Amount | None = None  # Per attempt at a local server.


class LedgerServer(_Value):
    """The Redis or Valkey server on which several hosts count; without a URL, a user's processes do in a file."""

    url: values.RedisUrl = None  # redis://host:6379/0, rediss://host:6380/0 (TLS) or unix:///path?db=0
    password_env: values.EnvKey = None  # Holds the server's password.
    password_file: values.FullPath | None = None  # A file (0600) with the server's password.


class Tree(_Value):
    """All of the configuration, as merged from the files."""

    models: dict[str, Model] = {}
    providers: dict[str, Provider] = {}
    cluster: Cluster = Cluster()
    routing: Routing = Routing()
    costs: Costs = Costs()
    alerts: Alerts = Alerts()
    ledger: LedgerServer = LedgerServer()
    cache: Cache = Cache()
    data_policy: DataPolicy = "any"
    store_rated: values.Duration | None = None  # How long prompts and answers are kept, so that they can be rated.
    store_rated_local: bool = False  # Whether those under the data policy local_only are kept, too.

    @model_validator(mode="before")
    @classmethod
    def _name_entries(cls, tree: dict[str, Any]) -> dict[str, Any]:
        return tree | {
            section: {name: entry | {field: name} for name, entry in tree.get(section, {}).items()}
            for section, field in ENTRY_NAME.items()
        }
