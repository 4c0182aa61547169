"""Translates the keys of one file: other tools' names (`api_base`, `rpm`) become ours, unknown ones are reported.

It happens before the layers are merged, where pydantic's aliases would come too late: `rpm` in the user's file
replaces a shipped `rate_limit`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, cast

from biollm.config.paths import FALSE
from biollm.config.values import as_list
from biollm.config.yaml import Document, KeyPath
from biollm.errors import nearest

Tree = dict[str, Any]
ENTRIES = ("models", "providers")  # sections that hold entries by name
BLOCKS = (*ENTRIES, "cluster", "routing", "costs", "alerts", "cache", "ledger", "locked")
SCALARS = ("data_policy", "store_rated", "store_rated_local")
TOP = (*BLOCKS, *SCALARS, "lenient", "inherit")
NO_MAPPING = "must be a mapping, its keys indented below it."
_NESTED = {("", block) for block in BLOCKS} | {
    ("cluster", "environment"),
    ("models", "architecture"),
    ("models", "scale"),
}
_RENAMED = {
    "providers": {"name": "title", "api_base": "base_url", "url": "base_url", "api_key_env": "env_key"},
    "accounts": {"api_key_env": "env_key"},
    "models": {"huggingface_id": "hf_id", "context_window": "context_length"},
}
_LIMITS = {  # another tool's key -> ours, and what its number lacks
    "rpm": ("rate_limit", "/min"), "rpd": ("rate_limit", "/day"), "tpm": ("token_limit", "/min"),
    "monthly_budget": ("budget", " USD/month"), "daily_limit": (None, "/day"), "monthly_limit": (None, "/month"),
}  # fmt: skip
_KEYS = ("api_key", "key", "token")
_CONVERTED = {"accounts": {*_LIMITS, *_KEYS}, "providers": {*_LIMITS, *_KEYS, "subscription"}}
_ADDED_UP = ("rate_limit", "token_limit", "token_budget", "budget")
_NO_EFFECT = {
    "startup_command": "`biollm up` starts the servers.",
    "slurm_partition": "the partition is in cluster.yaml.",
    "strategy": "the order is always that of the priorities.",
    "max_retries": "pass max_retries= in the call.",
    "failure_threshold": "a failing provider cools down for as long as its answers ask for.",
    "failure_reset_seconds": "a failing provider cools down for as long as its answers ask for.",
}
_HINTS = {("costs", "monthly_budget"): "Give each provider its own: `providers: {openai: {budget: 50 USD/month}}`."}


def aliases(section: str) -> set[str]:
    """Return the keys of other tools that a section understands."""
    return {*_RENAMED.get(section, ()), *_CONVERTED.get(section, ())}


def is_off(value: object) -> bool:
    """Return whether a file says no, false or off."""
    return str(value).lower() in FALSE


@dataclass(frozen=True)
class Translator:
    """Translates one file; what is wrong or odd goes into the document's problems and warnings. See `Layers.known`."""

    document: Document
    known: Mapping[str, Set[str]]
    lenient: bool

    def section(self, section: str, value: object, at: KeyPath = ()) -> Tree | None:
        """Return a mapping with our keys, without those that are unknown; None if it is not a mapping."""
        if not isinstance(value, dict):
            self.document.problems.append(self.document.problem(at, NO_MAPPING))
            return None
        out: Tree = {}
        for key, part in cast("Tree", value).items():
            here, ours = (*at, key), _RENAMED.get(section, {}).get(key, key)
            if key in _CONVERTED.get(section, ()):
                try:
                    ours, part = _converted(key, str(part))
                except ValueError as error:
                    self.document.problems.append(self.document.problem(here, str(error)))
                    continue
                if part is None:
                    continue
            elif ours in self.known[section]:
                part = self._part(section, ours, part, here)
            else:
                self._unknown(section, here)
                continue
            if ours in _ADDED_UP and ours in out:
                out[ours] = [*as_list(out[ours]), *as_list(part)]
            out.setdefault(ours, part)
            self.document.lines[*at, ours] = self.document.line(here)
        return out

    def _part(self, section: str, key: str, part: Any, at: KeyPath) -> Any:
        if section == "" and part is None:
            return {}
        if section == "" and key in ENTRIES and isinstance(part, dict):
            entries = {name: self.section(key, each, (*at, name)) for name, each in cast("Tree", part).items()}
            return {name: entry for name, entry in entries.items() if entry is not None}
        if key == "accounts" and isinstance(part, list):
            return [self.section(key, item, (*at, n)) or {} for n, item in enumerate(cast("list[Any]", part))]
        if (section, key) in _NESTED and part is not None:
            nested = self.section("" if key == "locked" else key, part, at)
            return {} if section == "" and nested is None else nested
        return part

    def _unknown(self, section: str, at: KeyPath) -> None:
        key = str(at[-1])
        if key in _NO_EFFECT:
            self.document.warnings.append(self.document.problem(at, f"has no effect here: {_NO_EFFECT[key]}"))
            return
        choices = {*self.known[section], *aliases(section)}
        hint = _HINTS.get((section, key)) or nearest(key, choices) or f"Known: {', '.join(sorted(choices))}."
        found = self.document.warnings if self.lenient else self.document.problems
        found.append(self.document.problem(at, "is not a known key.", hint))


def _converted(key: str, text: str) -> tuple[str, str | None]:
    """Return our key and value for another tool's; an API key in plain text is a ValueError."""
    if key == "subscription":
        return "free_tier", None if is_off(text) else "false"
    if key in _LIMITS:
        ours, period = _LIMITS[key]
        if ours:
            return ours, text + period
        dollars = re.search(r"\$|usd|dollar", text, re.I)
        ours = "rate_limit" if "req" in text.lower() else "budget" if dollars else "token_budget"
        return ours, text if "/" in text or " per " in text else text.strip() + period
    if found := re.fullmatch(r"os\.environ/(\w+)|\$\{?(\w+)\}?", text):
        return "env_key", found[1] or found[2]
    raise ValueError("a key must not be in a file. Export it, and write the variable's name as env_key.")
