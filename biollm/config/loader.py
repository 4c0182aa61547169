"""Reads models.yaml, providers.yaml and cluster.yaml, layer upon layer, into checked, frozen values.

LiteLLM's own configuration knows no layers with locks. Nothing else reads the user's YAML.

A later layer changes an entry key by key: mappings are merged; texts, numbers and lists replaced. At the top of a
file, `lenient: true` turns unknown keys into warnings, `inherit: false` drops what earlier layers said in the
sections that this file has, and what stands under `locked:` no later layer can change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from biollm._ownership import in_the_clear
from biollm.config import values as forms
from biollm.config.layers import FILES, SYNONYMS, TOP, Layers
from biollm.config.paths import config_dirs, wants_local_only
from biollm.config.schema import (
    LITELLM_PROVIDERS,
    Account,
    Alerts,
    Architecture,
    Cluster,
    Costs,
    Environment,
    Model,
    Provider,
    Routing,
)
from biollm.config.yaml import KeyPath, dotted
from biollm.errors import ConfigError, Problem, UnknownNameError, nearest
from biollm.types import DATA_POLICIES, DataPolicy

Value = TypeVar("Value", bound=BaseModel)


@dataclass(frozen=True)
class Config:
    """The whole configuration.

    Attributes:
        providers: Sorted by priority; equal ones in the order of the files. Disabled entries are left out.
        timeout: Seconds per attempt; `stream_timeout` to a stream's first content from a cloud provider (None is 12,
            60 where the model reasons).
        patience: Seconds to wait for an earlier deployment that frees so soon, before a later one is asked.
        on_refusal: Whether a refusal by content policy ends the request, or the next deployment is asked.
        policy: Whose turn it is within one priority.
        warnings: What is odd, though not wrong.
        sources: "providers.gemini.priority" -> "file:line"; `written`: the same key -> what stands there.
    """

    models: dict[str, Model] = field(default_factory=dict[str, Model])
    providers: tuple[Provider, ...] = ()
    cluster: Cluster = field(default_factory=Cluster)
    data_policy: DataPolicy = "any"
    costs: Costs = field(default_factory=Costs)
    alerts: Alerts = field(default_factory=Alerts)
    timeout: float = 60.0
    stream_timeout: float | None = None
    patience: float = 0.0
    on_refusal: Literal["stop", "next"] = "stop"
    policy: Literal["order", "cheapest"] = "order"
    warnings: tuple[Problem, ...] = ()
    sources: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    written: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def provider(self, name: str) -> Provider:
        """Return a provider that is switched on, or raise UnknownNameError."""
        by_name = {provider.name: provider for provider in self.providers}
        if name not in by_name:
            raise UnknownNameError("provider", name, by_name)
        return by_name[name]

    def problem(self, key: str, message: str, hint: str | None = None) -> Problem:
        """Return a sentence about a key, placed where it was written, or the first one beside it."""
        beside = (at for at in self.sources if at.startswith(key.rpartition(".")[0] + "."))
        file, _, line = self.sources.get(key if key in self.sources else next(beside, ""), ":0").rpartition(":")
        return Problem(file or "configuration", int(line), key, message, hint)


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
    for provider in providers:
        keyed = any(account.env_key or account.key_file for account in provider.accounts)
        if keyed and (why := in_the_clear(provider.base_url or "", cluster.local_hosts if cluster else ())):
            layers.warnings.append(layers.problem(("providers", provider.name, "base_url"), f"is never asked: {why}."))
    policy = layers.data.get("data_policy", "any")
    if policy not in DATA_POLICIES:
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
        patience=routing.patience,
        on_refusal=routing.on_refusal,
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
        need = "An OpenAI-compatible API needs a base_url, others litellm_provider."
        hint = nearest(provider.name, LITELLM_PROVIDERS) or need
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
            yield at, f"{name} is not defined in models.yaml.", nearest(name, named) or None
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
        "data_policy": DataPolicy,
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
