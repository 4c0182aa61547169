"""Merges the configuration folders into one tree, and knows which file and line wrote each value.

Here the keys of other people's files are translated into ours and unknown ones found; values are checked in `config`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from biollm.config.paths import FALSE
from biollm.config.values import as_list
from biollm.config.yaml import Document, KeyPath, dotted, read
from biollm.errors import Problem, nearest
from biollm.types import DATA_POLICIES

Tree = dict[str, Any]
Form = Callable[[str], Tree]
FILES = ("models", "providers", "cluster")
_BLOCKS = (*FILES, "routing", "costs", "alerts", "locked")  # what holds keys of its own
TOP = (*_BLOCKS, "data_policy", "lenient", "inherit")
_ENTRIES = ("models", "providers")  # sections that hold entries by name
_ALTERNATIVES = (("env_key", "key_file", "accounts"), ("venv", "conda", "container"))  # a later one replaces the others
_MAPPINGS = {("", key) for key in _BLOCKS} | {("cluster", "environment"), ("models", "architecture")}


def _quota(period: str) -> Form:
    def form(text: str) -> Tree:
        kind = (
            "rate_limit"
            if "req" in text.lower()
            else "budget"
            if re.search(r"\$|usd|dollar", text, re.I)
            else "token_budget"
        )
        return {kind: text if "/" in text or " per " in text else f"{text.strip()}/{period}"}

    return form


def _key(text: str) -> Tree:
    if found := re.fullmatch(r"os\.environ/(\w+)|\$\{?(\w+)\}?", text):
        return {"env_key": found[1] or found[2]}
    raise ValueError("a key has no place in a file. Export it, and write the variable's name as env_key.")


def _subscription(text: str) -> Tree:
    return {} if text.lower() in FALSE else {"free_tier": "false"}


_LIMITED: dict[str, str | Form] = {
    "api_key": _key, "key": _key, "token": _key, "api_key_env": "env_key",
    "rpm": lambda text: {"rate_limit": f"{text}/min"}, "rpd": lambda text: {"rate_limit": f"{text}/day"},
    "tpm": lambda text: {"token_limit": f"{text}/min"}, "daily_limit": _quota("day"), "monthly_limit": _quota("month"),
    "monthly_budget": lambda text: {"budget": f"{text} USD/month"},
}  # fmt: skip
SYNONYMS: dict[str, dict[str, str | Form]] = {
    "providers": _LIMITED
    | {"name": "title", "api_base": "base_url", "url": "base_url"}
    | {"subscription": _subscription},
    "accounts": _LIMITED,
    "models": {"huggingface_id": "hf_id", "context_window": "context_length"},
}
_ADDED_UP = ("rate_limit", "token_limit", "token_budget", "budget")
_NO_MAPPING = "must be a mapping, its keys indented below it."
_NO_EFFECT = {
    "startup_command": "`biollm up` starts the servers.",
    "slurm_partition": "cluster.yaml holds the partition.",
    "strategy": "the order is always that of the priorities.",
    "max_retries": "say it in the call (max_retries=).",
    "failure_threshold": "a failing provider rests as long as its answers ask for.",
    "failure_reset_seconds": "a failing provider rests as long as its answers ask for.",
}


class Layers:
    """The merged tree (`data`), where each part came from, and what was wrong or odd on the way.

    Args:
        known: Section ("models", "accounts", "environment" ...) -> the keys it may hold; "" is a file's top.
        lenient: Unknown keys are warnings in every file, not only where `lenient: true` stands.
    """

    def __init__(self, known: Mapping[str, Iterable[str]], *, lenient: bool) -> None:
        self.known = {section: set(keys) for section, keys in known.items()}
        self.known["costs"].add("monthly_budget")
        self.lenient = self.always_lenient = lenient
        self.data: Tree = {}
        self.origin: dict[KeyPath, tuple[Document, KeyPath]] = {}
        self.locked: dict[KeyPath, Any] = {}
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def add(self, folder: Path) -> bool:
        """Merge the files of one folder over what is there; return whether it has any."""
        for wrong in (folder / f"{name}.yml" for name in FILES):
            if wrong.exists():
                self.problems.append(Problem(str(wrong), 0, "", f"is not read. Rename it to {wrong.stem}.yaml."))
        files = [path for path in (folder / f"{name}.yaml" for name in FILES) if path.exists()]
        for path in files:
            document = read(path)
            self.problems += document.problems
            self._add(document)
        return bool(files)

    def _add(self, document: Document) -> None:
        self.lenient = self.always_lenient or not _off(document.value.get("lenient", "no"))
        tree = self._entry(document, "", document.value, ()) or {}
        locks: Tree = tree.pop("locked", None) or {}
        tree.pop("lenient", None)
        if _off(tree.pop("inherit", None)):
            self._forget(tree)
        self._merge(tree, document, (), ())
        self._merge(locks, document, (), ("locked",))
        self.locked |= dict(_leaves(locks))

    def _forget(self, sections: Iterable[str]) -> None:
        """Drop what earlier layers said in these sections, but for what they locked."""
        for section in {*sections} - {"data_policy"}:
            self.data.pop(section, None)
        for path, value in self.locked.items():
            node = self.data
            for part in path[:-1]:
                node = node.setdefault(str(part), {})
            node[str(path[-1])] = value

    def _entry(self, document: Document, section: str, value: object, at: KeyPath) -> Tree | None:
        """Return a mapping with its keys translated to ours; unknown ones are reported and left out."""
        if (tree := _mapping(value)) is None:
            self.problems.append(document.problem(at, _NO_MAPPING))
            return None
        out: Tree = {}
        for key, part in tree.items():
            here, new = (*at, key), SYNONYMS.get(section, {}).get(key, key)
            if callable(new):
                self._translate(document, out, new, str(part), here)
            elif new in self.known[section]:
                _put(out, new, self._part(document, section, new, part, here))
                document.lines[*at, new] = document.line(here)
            elif key in _NO_EFFECT:
                self.warnings.append(document.problem(here, f"has no effect here: {_NO_EFFECT[key]}"))
            else:
                self._unknown(document, section, here)
        if section == "":
            self._budgets(document, out, at)
        return out

    def _part(self, document: Document, section: str, key: str, part: Any, at: KeyPath) -> Any:
        """Translate what lies below a key, where that has known keys too."""
        if section == "" and key in _ENTRIES and part is not None:
            if (named := _mapping(part)) is None:
                self.problems.append(document.problem(at, _NO_MAPPING))
            entries = {name: self._entry(document, key, each, (*at, name)) for name, each in (named or {}).items()}
            return {name: entry for name, entry in entries.items() if entry is not None}
        if key == "accounts" and isinstance(part, list):
            accounts = enumerate(cast("list[Any]", part))
            return [self._entry(document, key, item, (*at, place)) or {} for place, item in accounts]
        if (section, key) in _MAPPINGS and part is not None:
            return self._entry(document, "" if key == "locked" else key, part, at)
        return {} if section == "" and part is None else part

    def _translate(self, document: Document, out: Tree, form: Form, text: str, at: KeyPath) -> None:
        try:
            for key, value in form(text).items():
                _put(out, key, value)
                document.lines[*at[:-1], key] = document.line(at)
        except ValueError as error:
            self.problems.append(document.problem(at, str(error)))

    def _budgets(self, document: Document, top: Tree, at: KeyPath) -> None:
        """Give the providers the budgets that stand in a `costs:` block."""
        costs: Tree = top.get("costs") or {}
        written = costs.pop("monthly_budget", None)
        budgets = _mapping(written) or {}
        if written is not None and not isinstance(written, dict):
            why = "must name a provider for each amount: a budget belongs to one."
            place = (*at, "costs", "monthly_budget")
            self.problems.append(document.problem(place, why, "Write it like {openai: 50}, in USD."))
        for name, amount in budgets.items():
            top.setdefault("providers", {}).setdefault(name, {}).setdefault("budget", f"{amount} USD/month")
            line = document.line((*at, "costs", "monthly_budget", name))
            document.lines[*at, "providers", name, "budget"] = document.lines.setdefault((*at, "providers", name), line)

    def _unknown(self, document: Document, section: str, at: KeyPath) -> None:
        choices = {*self.known[section], *SYNONYMS.get(section, ())}
        hint = nearest(str(at[-1]), choices) or f"Known: {', '.join(sorted(choices))}."
        (self.warnings if self.lenient else self.problems).append(document.problem(at, "is not a known key.", hint))

    def _merge(self, tree: Tree, document: Document, path: KeyPath, at: KeyPath) -> None:
        node = self.data
        for part in path:
            node = node[str(part)]
        for group in _ALTERNATIVES:
            if any(tree.get(key) is not None for key in group):
                for key in group:
                    if key not in tree and (*path, key) not in self.locked:
                        node.pop(key, None)
        for key, value in tree.items():
            part: object = value
            there, source, old = (*path, key), (*at, key), node.get(key)
            if isinstance(value, dict) and isinstance(old, dict | None) and there not in self.locked:
                node[key] = node.get(key) or {}
                self.origin[there] = (document, source)
                self._merge(cast("Tree", value), document, there, source)
            elif isinstance(old, dict):
                self.problems.append(document.problem(source, _NO_MAPPING))
            elif there in self.locked and value != old and key != "data_policy":
                self.problems.append(document.problem(source, f"is locked by {self.where(there)}.", "Take it out."))
            elif key != "data_policy" or _strictness(part) >= _strictness(old):  # which no later layer loosens
                node[key] = value
                self.origin[there] = (document, source)

    def problem(self, path: KeyPath, message: str, hint: str | None = None) -> Problem:
        """Return a problem of the merged tree, at the file and line that wrote it."""
        start = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.origin), None)
        if start is None:
            return Problem("configuration", 0, dotted(path), message, hint)
        document, at = self.origin[start]
        found = document.problem((*at, *path[len(start) :]), message, hint)
        return Problem(found.file, found.line, dotted(path), message, hint)

    def where(self, path: KeyPath) -> str:
        """Return "file:line" of a value."""
        found = self.problem(path, "")
        return f"{found.file}:{found.line}"

    def values(self) -> dict[KeyPath, Any]:
        """Return every value that a file wrote, by its path."""
        return {path: value for path, value in _leaves(self.data) if path in self.origin}

    def take_out_disabled(self) -> None:
        """Drop the entries with `enabled: false`, and disabled models from the lists of their providers."""
        for section in _ENTRIES:
            entries: dict[str, Tree] = self.data.setdefault(section, {})
            off = {name: entries.pop(name) for name in list(entries) if _off(entries[name].get("enabled"))}
            for name in [name for name, entry in off.items() if entry.keys() == {"enabled"}]:
                hint = nearest(name, [*entries, *(off.keys() - {name})]) or None
                self.warnings.append(self.problem((section, name), "switches off what nothing defines.", hint))
            if section == "models":
                for name, provider in self.data.get("providers", {}).items():
                    if isinstance(provider.get("models"), list):
                        self._leave_out([*off], provider, ("providers", name, "models"))

    def _leave_out(self, off: list[str], provider: Tree, at: KeyPath) -> None:
        """Take disabled models out of a provider's list; what stays keeps the line that wrote it."""
        document, source = self.origin[at]
        kept = [(place, model) for place, model in enumerate(provider["models"]) if model not in off]
        provider["models"] = [model for _, model in kept]
        self.origin |= {(*at, new): (document, (*source, old)) for new, (old, _) in enumerate(kept)}


def _put(out: Tree, key: str, value: Any) -> None:
    """Set a key that a synonym may have set already: limits add up, of others the first stays."""
    if key in _ADDED_UP and key in out:
        out[key] = [*as_list(out[key]), *as_list(value)]
    out.setdefault(key, value)


def _mapping(value: object) -> Tree | None:
    return cast("Tree", value) if isinstance(value, dict) else None


def _off(value: object) -> bool:
    return str(value).lower() in FALSE


def _strictness(policy: object) -> int:
    return 0 if policy is None else DATA_POLICIES.index(policy) if policy in DATA_POLICIES else len(DATA_POLICIES)


def _leaves(tree: Tree, path: KeyPath = ()) -> Iterable[tuple[KeyPath, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(cast("Tree", value), (*path, key))
        else:
            yield (*path, key), value
