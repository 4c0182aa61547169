"""Merges the configuration folders into one tree, and knows where each value came from.

Keys that other people's files use are translated here; unknown keys are found here, where file and line are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from biollm._yaml import Document, KeyPath, dotted, read
from biollm.errors import Problem, nearest

Tree = dict[str, Any]
FILES = ("models", "providers", "cluster")
POLICIES = ("any", "no_training", "local_only")
FALSE = ("false", "no", "off", "0")
_TOP = ("models", "providers", "cluster", "routing", "costs", "data_policy", "lenient", "inherit", "locked")
_CHILDREN = (
    "accounts",
    "environment",
    "architecture",
)  # fields that hold mappings with known keys themselves
_INTERNAL = {"key", "limits"}


def _monthly(period: str) -> Callable[[str], Tree]:
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


_LIMITED: dict[str, str | Callable[[str], Tree]] = {
    "api_key_env": "env_key", "key_env": "env_key", "env_var": "env_key", "api_key": _key, "key": _key, "token": _key,
    "rpm": lambda text: {"rate_limit": f"{text}/min"}, "rpd": lambda text: {"rate_limit": f"{text}/day"},
    "tpm": lambda text: {"token_limit": f"{text}/min"}, "daily_limit": _monthly("day"), "monthly_limit": _monthly("month"),
    "monthly_budget": lambda text: {"budget": f"{text} USD/month" if text.replace(".", "").isdigit() else f"{text}/month"},
}  # fmt: skip
SYNONYMS: dict[str, dict[str, str | Callable[[str], Tree]]] = {
    "providers": _LIMITED | {
        "name": "title", "api_base": "base_url", "url": "base_url", "endpoint": "base_url",
        "subscription": lambda text: {} if text.lower() in FALSE else {"free_tier": "false"},
    },
    "accounts": _LIMITED,
    "models": {"huggingface_id": "hf_id", "hf_model": "hf_id", "context_window": "context_length", "max_context": "context_length"},
}  # fmt: skip
_NO_EFFECT = {
    "startup_command": "`biollm up` starts the servers.",
    "slurm_partition": "cluster.yaml holds the partition.",
    "strategy": "the order is always that of the priorities.",
    "max_retries": "say it in the call (max_retries=).",
    "failure_threshold": "a failing provider rests as long as its own answer says.",
    "failure_reset_seconds": "a failing provider rests as long as its own answer says.",
}


class Layers:
    """The merged tree (`data`), the document that each part came from, and what was wrong or odd on the way.

    Args:
        known: Section ("models", "accounts", "environment" ...) -> the keys it may hold.
        lenient: Unknown keys are warnings in every file, not only where `lenient: true` stands.
    """

    def __init__(self, known: Mapping[str, Iterable[str]], *, lenient: bool) -> None:
        self.known = {section: set(keys) - _INTERNAL for section, keys in known.items()}
        self.lenient = lenient
        self.data: Tree = {}
        self.origin: dict[KeyPath, tuple[Document, KeyPath]] = {}
        self.locked: dict[KeyPath, Any] = {}
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def add(self, folder: Path) -> bool:
        """Merge the files of one folder over what is there; return whether it has any."""
        for name in FILES:
            if (wrong := folder / f"{name}.yml").exists():
                self.problems.append(Problem(str(wrong), 0, "", f"is not read. Rename it to {name}.yaml."))
        files = [path for path in (folder / f"{name}.yaml" for name in FILES) if path.exists()]
        for path in files:
            document = read(path)
            self.problems += document.problems
            self._add(document)
        return bool(files)

    def _add(self, document: Document) -> None:
        value = document.value
        lenient = self.lenient or not _false(value.get("lenient"), default=True)
        tree = self._top(document, value, (), lenient)
        locks = self._top(document, tree.pop("locked", None) or {}, ("locked",), lenient)
        if _false(value.get("inherit")):
            for section in tree:
                self.data.pop(section, None)
            for path, kept in self.locked.items():
                self._put(path, kept)
        self._merge(tree, document, (), ())
        self._merge(locks, document, (), ("locked",))
        self.locked |= {path: self._get(path) for path in _leaves(locks)}

    def _top(self, document: Document, value: Tree, at: KeyPath, lenient: bool) -> Tree:
        out: Tree = {}
        for key, part in value.items():
            here = (*at, key)
            if key not in _TOP:
                self._unknown(document, here, _TOP, lenient)
            elif key in ("lenient", "inherit") or part is None:
                continue
            elif key in ("data_policy", "locked"):
                out[key] = part
            elif not isinstance(part, dict):
                self.problems.append(
                    document.problem(here, "must be a mapping, its entries indented below it.")
                )
            elif key in ("models", "providers"):
                entries = cast("Tree", part)
                named = {
                    name: self._entry(document, key, entry, (*here, name), lenient)
                    for name, entry in entries.items()
                }
                out[key] = {name: entry for name, entry in named.items() if entry is not None}
            else:
                out[key] = self._entry(document, key, part, here, lenient)
        for name, amount in out.get("costs", {}).pop("monthly_budget", {}).items():
            budget = out.setdefault("providers", {}).setdefault(name, {})
            budget.setdefault("budget", f"{amount} USD/month")
            document.lines[*at, "providers", name] = document.lines[*at, "costs", "monthly_budget", name]
        return out

    def _entry(
        self, document: Document, section: str, value: object, at: KeyPath, lenient: bool
    ) -> Tree | None:
        """Return a mapping with its keys translated to ours; unknown ones are reported and left out."""
        if not isinstance(value, dict):
            self.problems.append(document.problem(at, "must be a mapping, its keys indented below it."))
            return None
        known, synonyms, out = self.known[section], SYNONYMS.get(section, {}), dict[str, Any]()
        for key, part in cast("Tree", value).items():
            here = (*at, key)
            new = synonyms.get(key, key)
            if callable(new):
                self._form(document, out, new, part, here)
            elif new in known:
                out[new] = self._child(document, new, part, here, lenient)
                document.lines[*at, new] = document.lines.get(here, document.lines.get(at, 0))
            elif key in _NO_EFFECT:
                self.warnings.append(document.problem(here, f"has no effect here: {_NO_EFFECT[key]}"))
            else:
                self._unknown(document, here, (*known, *synonyms), lenient)
        return out

    def _form(
        self, document: Document, out: Tree, form: Callable[[str], Tree], part: Any, at: KeyPath
    ) -> None:
        try:
            translated = form(str(part))
        except ValueError as error:
            self.problems.append(document.problem(at, str(error)))
            return
        for key, text in translated.items():
            there = out.get(key)
            out[key] = (
                text
                if there is None
                else [*(cast("list[Any]", there) if isinstance(there, list) else [there]), text]
            )
            document.lines[*at[:-1], key] = document.lines.get(at, 0)

    def _child(self, document: Document, key: str, part: Any, at: KeyPath, lenient: bool) -> Any:
        if key not in _CHILDREN or part is None:
            return part
        if key != "accounts" or not isinstance(part, list):
            return self._entry(document, key, part, at, lenient)
        items = enumerate(cast("list[Any]", part))
        return [self._entry(document, key, item, (*at, place), lenient) or {} for place, item in items]

    def _unknown(self, document: Document, at: KeyPath, choices: Iterable[str], lenient: bool) -> None:
        near = nearest(str(at[-1]), choices)
        hint = f"Did you mean {near}?" if near else f"Known: {', '.join(sorted(choices))}."
        (self.warnings if lenient else self.problems).append(
            document.problem(at, "is not a known key.", hint)
        )

    def _merge(self, value: Tree, document: Document, path: KeyPath, at: KeyPath) -> None:
        here = self._get(path)
        if (
            path[:1] == ("providers",) and len(path) == 2
        ):  # a key of its own replaces accounts, and the other way round
            if (
                "accounts" not in value
                and {"env_key", "key_file"} & value.keys()
                and (*path, "accounts") not in self.locked
            ):
                here.pop("accounts", None)
            elif "accounts" in value:
                here.pop("env_key", None), here.pop("key_file", None)
        for key, part in value.items():
            there, source = (*path, key), (*at, key)
            old = here.get(key)
            if path == () and key == "data_policy":
                if part in POLICIES and old in POLICIES and POLICIES.index(part) < POLICIES.index(old):
                    continue  # no later layer loosens it
                here[key] = part
            elif (
                isinstance(part, dict) and (old is None or isinstance(old, dict)) and there not in self.locked
            ):
                here.setdefault(key, {})
                here[key] = {} if here[key] is None else here[key]
                self.origin[there] = (document, source)
                self._merge(cast("Tree", part), document, there, source)
                continue
            elif isinstance(old, dict):
                self.problems.append(
                    document.problem(source, "must be a mapping, its keys indented below it.")
                )
                continue
            elif there in self.locked:
                if part != old:
                    self.problems.append(
                        document.problem(source, f"is locked by {self.where(there)}.", "Take it out.")
                    )
                continue
            else:
                here[key] = part
            self.origin[there] = (document, source)

    def _get(self, path: KeyPath) -> Any:
        node: Any = self.data
        for part in path:
            node = node[part]
        return node

    def _put(self, path: KeyPath, value: Any) -> None:
        node: Any = self.data
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value

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

    def sources(self) -> dict[str, str]:
        """Return "file:line" of every value, by its dotted key."""
        return {dotted(path): self.where(path) for path in _leaves(self.data) if path in self.origin}

    def take_out_disabled(self) -> None:
        """Drop the entries with `enabled: false`, and disabled models from the lists of their providers."""
        for section in ("models", "providers"):
            entries: dict[str, Tree] = self.data.setdefault(section, {})
            for name in [name for name, entry in entries.items() if _false(entry.get("enabled"))]:
                entry = entries.pop(name)
                if entry.keys() == {"enabled"}:
                    near = nearest(name, entries)
                    hint = f"Did you mean {near}?" if near else None
                    self.warnings.append(
                        self.problem((section, name), "switches off what nothing defines.", hint)
                    )
                for provider in self.data.get("providers", {}).values() if section == "models" else ():
                    if isinstance(provider.get("models"), list) and provider["models"]:
                        provider["models"] = [model for model in provider["models"] if model != name]


def _false(value: object, *, default: bool = False) -> bool:
    return default if value is None else str(value).lower() in FALSE


def _leaves(tree: Tree, path: KeyPath = ()) -> list[KeyPath]:
    found: list[KeyPath] = []
    for key, value in tree.items():
        found += (
            _leaves(cast("Tree", value), (*path, key))
            if isinstance(value, dict) and value
            else [(*path, key)]
        )
    return found
