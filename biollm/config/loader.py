"""Reads models.yaml, providers.yaml and cluster.yaml, layer upon layer, into checked, frozen values.

LiteLLM's own configuration has no layers and no locks. Here a later layer changes an entry key by key: mappings are
merged; strings, numbers and lists replaced. At the top of a file, `lenient: true` turns unknown keys into warnings,
`inherit: false` drops what earlier layers wrote in its sections, and `locked:` holds what no later one can change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import getsource, signature
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, create_model

from biollm._ownership import in_the_clear
from biollm.config import schema, values
from biollm.config.aliases import SCALARS, TOP, aliases
from biollm.config.merge import FILES, Layers
from biollm.config.paths import config_dirs, wants_local_only
from biollm.config.schema import ENTRY_NAME, Alerts, Cache, Cluster, Costs, Environment, Model, Provider, Routing, Tree
from biollm.config.values import as_list, masked, shown
from biollm.config.yaml import KeyPath, dotted
from biollm.errors import ConfigError, Problem, UnknownNameError, nearest
from biollm.types import DataPolicy

_SECTIONS: dict[str, Any] = {
    "models": Model, "providers": Provider, "cluster": Cluster, "routing": Routing, "costs": Costs,
    "alerts": Alerts, "cache": Cache, "ledger": schema.LedgerServer, "accounts": schema.Account, "environment": Environment,
    "architecture": schema.Architecture, "scale": schema.Scale,
}  # fmt: skip
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels

_NEW_MODEL = {  # how one of a type is defined
    "local": "Add it there: `{}: {{hf_id: ORG/NAME}}`. A server that runs elsewhere is of `type: api`.",
    "embedded": "Add it there: `{}: {{type: embedded, gguf: ORG/REPO/FILE.gguf}}`.",
}


@dataclass(frozen=True)
class Config:
    """The whole configuration, without disabled entries."""

    models: dict[str, Model] = field(default_factory=dict[str, Model])
    providers: tuple[Provider, ...] = ()  # by priority; equal ones in the order of the files
    cluster: Cluster = field(default_factory=Cluster)
    data_policy: DataPolicy = "any"
    costs: Costs = field(default_factory=Costs)
    alerts: Alerts = field(default_factory=Alerts)
    routing: Routing = field(default_factory=Routing)
    store_rated: float | None = None
    store_rated_local: bool = False
    ledger: schema.LedgerServer = field(default_factory=schema.LedgerServer)
    cache: Cache = field(default_factory=Cache)
    warnings: tuple[Problem, ...] = ()
    sources: dict[str, str] = field(default_factory=dict[str, str], repr=False)  # "providers.x.priority" -> "file:line"
    written: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)  # the same key -> the value there

    def provider(self, name: str) -> Provider:
        """Return an enabled provider, or raise UnknownNameError."""
        by_name = {provider.name: provider for provider in self.providers}
        if name not in by_name:
            raise UnknownNameError("provider", name, by_name)
        return by_name[name]

    def server_of(self, name: str) -> Model | None:
        """Return the model by which a server for `name` is started: the base of a LoRA adapter; None if there is none."""
        model = self.models.get(name)
        return self.models[model.base] if model and model.base else model

    def problem(self, key: str, message: str, hint: str | None = None) -> Problem:
        """Return a problem at the line of a key, or of the first key beside it."""
        beside = (at for at in self.sources if at.startswith(key.rpartition(".")[0] + "."))
        file, _, line = self.sources.get(key if key in self.sources else next(beside, ""), ":0").rpartition(":")
        return Problem(file or "configuration", int(line), key, message, hint)


def load_config(directory: Path | None = None, *, lenient: bool = False) -> Config:
    """Read all layers: shipped, site, user, BIOLLM_CONFIG_DIR; `directory` replaces the last two.

    Raises:
        ConfigError: Something is wrong; it lists every problem found, with file and line.
    """
    known = {name: {*signature(part).parameters} - {ENTRY_NAME.get(name)} for name, part in _SECTIONS.items()}
    layers = Layers({"": set(TOP), **known}, lenient=lenient)
    folders = config_dirs() if directory is None else [*config_dirs()[:2], ("directory", directory)]
    for name, folder in folders:
        if not layers.add(folder) and name in ("directory", "BIOLLM_CONFIG_DIR"):
            names = ", ".join(f"{each}.yaml" for each in FILES)
            strays = [str(each) for each in layers.warnings if Path(each.file).parent == folder]
            message = f"does not exist, or has none of {names}."
            layers.problems.append(Problem(str(folder), 0, "", message, " ".join(strays) or None))
    if wants_local_only():
        layers.data["data_policy"] = "local_only"
    layers.remove_disabled()
    _check_between(layers)
    tree = Tree()
    try:
        tree = Tree.model_validate(layers.data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = tuple(part for part in detail["loc"] if part != "[key]")
            layers.report(path, sentence(detail), _hint(path, layers.data) if detail["type"] == "missing" else None)
    if layers.problems:
        raise ConfigError(sorted(dict.fromkeys(layers.problems), key=lambda problem: (problem.file, problem.line)))
    providers = sorted(tree.providers.values(), key=lambda provider: provider.priority)
    if slow := tree.routing.local_timeout:
        providers = [p if p.timeout or p.type == "api" else p.model_copy(update={"timeout": slow}) for p in providers]
    _warn(layers, providers, tree.cluster)
    written = layers.values()
    names = ("cluster", "costs", "alerts", "routing", "cache", "ledger", *SCALARS)
    parts = {name: getattr(tree, name) for name in names}
    return Config(
        **parts,
        models=_with_adapters(tree.models),
        providers=tuple(providers),
        warnings=tuple(layers.warnings),
        sources={dotted(path): layers.where(path) for path in written},
        written={dotted(path): value for path, value in written.items()},
    )


def _with_adapters(models: dict[str, Model]) -> dict[str, Model]:
    """Return the models with each LoRA adapter added to its base's server, and with what it inherits from its base."""
    found = dict(models)
    for base in models.values():
        if not (adapters := [each for each in models.values() if each.base == base.key]):
            continue
        rank = max(adapter.lora_rank for adapter in adapters)
        args = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": min(r for r in _RANKS if r >= rank)}
        modules = [f"{adapter.key}={adapter.lora}" for adapter in adapters]
        args |= base.vllm_args | {"lora_modules": [*as_list(base.vllm_args.get("lora_modules") or []), *modules]}
        found[base.key] = base.model_copy(update={"vllm_args": args})
        own = {"name": "", "description": "", "priority": None, "scale": None}
        for adapter in adapters:
            own_values = own | {name: getattr(adapter, name) for name in adapter.model_fields_set}
            found[adapter.key] = found[base.key].model_copy(update=own_values)
    return found


def _hint(missing: KeyPath, data: Mapping[str, Any]) -> str | None:
    """Return what to write for a missing key, or which entry may have been meant."""
    match missing:
        case ("providers", str(name), "type"):
            near = nearest(name, data["providers"].keys() - {name})
            return f"Write api, local or embedded. {near}".strip()
        case _:
            return None


def _check_between(layers: Layers) -> None:
    """Report what is wrong between entries, each of which may be wrong itself."""
    models: dict[str, dict[str, Any]] = layers.data["models"]
    for name, model in models.items():
        kind = model.get("type", "local")
        need = {"local": "an hf_id or a path", "embedded": "a gguf"}.get(str(kind))
        if base := model.get("base"):
            other = models.get(str(base))
            if other is None or other.get("type", "local") != "local" or other.get("base"):
                message = f"{base} is not a local model with weights of its own."
                layers.report(("models", name, "base"), message, nearest(str(base), models.keys() - {name}) or None)
        elif need and not (model.get("path") or model.get("hf_id" if kind == "local" else "gguf")):
            near = nearest(name, models.keys() - {name}) if "type" not in model else ""
            layers.report(("models", name), f"needs {need}, being of type {kind}.", near or None)
    titles: dict[str, str] = {}
    for name, provider in layers.data["providers"].items():
        if (other := titles.setdefault(str(provider.get("title") or name), name)) != name:
            layers.report(("providers", name, "title"), f"is the name of {other} already.")
        kind, listed = provider.get("type"), as_list(provider.get("models"))
        for place, model in enumerate(listed):
            at = ("providers", name, "models", place)
            if model in listed[:place]:
                layers.report(at, f"lists {model} twice.")
            elif kind in ("local", "embedded") and isinstance(model, str):
                if model not in models:
                    hint = nearest(model, models) or _NEW_MODEL[kind].format(model)
                    layers.report(at, f"{model} is not defined in models.yaml.", hint)
                elif (other := models[model].get("type", "local")) != kind:
                    layers.report(at, f"{model} is of type {other}, and this provider of type {kind}.")


def _warn(layers: Layers, providers: Sequence[Provider], cluster: Cluster) -> None:
    if not providers:
        layers.warnings.append(Problem("configuration", 0, "", "No provider is enabled: no request can be answered."))
    for provider in providers:
        path = ("providers", provider.name)
        if not provider.models:
            layers.warnings.append(layers.problem(path, "has no models, so it is never used."))
        if str(layers.data["providers"][provider.name].get("base_url")).rstrip("/").endswith(values.ROUTE):
            message = f"should end before {values.ROUTE}, which is added to each request."
            layers.warnings.append(layers.problem((*path, "base_url"), message, f"Write {provider.base_url}."))
        if why := in_the_clear(provider.base_url or "", cluster.local_hosts):
            layers.warnings.append(layers.problem((*path, "base_url"), f"is never used: {why}."))


_SENTENCES = {
    "missing": "is missing.", "tuple_type": "must be a list.", "frozen_set_type": "must be a list.",
    "dict_type": "must be a mapping.", "model_type": "must be a mapping.", "string_type": "must be a string.",
    "int_parsing": "must be a whole number, not {shown}.", "int_type": "must be a whole number.",
    "float_parsing": "must be a number, not {shown}.", "float_type": "must be a number.",
    "bool_parsing": "must be true or false, not {shown}.", "bool_type": "must be true or false.",
    "literal_error": "must be {expected}, not {shown}.", "string_pattern_mismatch": "cannot be {shown}: it must match {pattern}.",
    "greater_than": "must be more than {gt:g}, not {shown}.", "greater_than_equal": "must be at least {ge:g}, not {shown}.",
    "less_than_equal": "must be at most {le:g}, not {shown}.", "value_error": "{error}",
    "extra_forbidden": "is not a known key.", "string_too_short": "must have at least {min_length} characters.",
}  # fmt: skip


def sentence(detail: Any) -> str:
    """Return one of pydantic's errors as a sentence that prints no key, and nothing of the input if it has none."""
    text = _SENTENCES.get(detail["type"], "is wrong: {msg}.")
    text = text if "input" in detail else text.replace(", not {shown}", "")
    return text.format_map({"msg": detail["msg"], "shown": shown(detail.get("input")), **detail.get("ctx", {})})


def describe(config: Config) -> list[tuple[str, str, str]]:
    """Return every value in effect as (key, value, "file:line" or "default"), with secrets masked."""
    rows = {key: (value, config.sources[key]) for key, value in config.written.items()}
    rows["data_policy"] = (config.data_policy, config.sources.get("data_policy", "default"))
    for name, value in config.cluster:
        if value not in (None, (), Environment()) and name != "environment":
            rows.setdefault(f"cluster.{name}", (value, "default"))
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, default=str) for key, (value, _) in rows.items()
    }
    return [(key, masked(text), rows[key][1]) for key, text in texts.items()]


def json_schema(kind: Literal["models", "providers", "cluster"]) -> dict[str, Any]:
    """Return the JSON Schema of a file, for editors. No key is required: a layer may be partial.

    A comment beside a field in `schema.py` is the description that an editor shows for the key.
    """
    names = (kind, "routing", "costs", "alerts", "cache", "ledger", *SCALARS)
    create: Any = create_model  # whose types know no computed field names
    part_of_tree = create(kind, **{name: (Tree.model_fields[name].annotation, ...) for name in names})
    schema: dict[str, Any] = part_of_tree.model_json_schema()
    schema["properties"] |= {"lenient": {"type": "boolean"}, "inherit": {"type": "boolean"}, "locked": {}}
    sections = {each.__name__: section for section, each in _SECTIONS.items()}
    for name, part in (("", schema), *schema["$defs"].items()):
        section = sections.get(name, "")
        part |= {"additionalProperties": False, "required": []}
        for key, comment in re.findall(
            r"^    (\w+): .*  # (.+)", getsource(_SECTIONS[section]) if section else "", re.M
        ):
            part["properties"][key]["description"] = comment
        part["properties"].pop(ENTRY_NAME.get(section), None)
        part["properties"] |= {key: {"description": "Translated."} for key in sorted(aliases(section))}
    schema["properties"][kind] = {"anyOf": [schema["properties"][kind], {"type": "null"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
