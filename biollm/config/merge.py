"""Merges the configuration folders into one tree, and keeps the file and line that wrote each value.

LiteLLM's configuration is one file. Here a site sets defaults and locks, and a user changes single keys of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from biollm.config.aliases import ENTRIES, NO_MAPPING, SCALARS, Translator, Tree, is_off
from biollm.config.yaml import Document, KeyPath, dotted, read
from biollm.errors import Problem, nearest
from biollm.types import DATA_POLICIES

FILES = ("models", "providers", "cluster")
_READ = (*FILES, "gateway_keys")
_ALTERNATIVES = (
    ("env_key", "key_file", "accounts"),
    ("venv", "conda", "container"),
    ("password_env", "password_file"),
)  # a later one replaces the others


class Layers:
    """The merged tree (`data`), the origin of each part, what is locked, and what is wrong or odd in the files.

    `known` has the keys that each section ("models", "accounts", "environment" ...) may hold; "" is a file's top.
    """

    def __init__(self, known: Mapping[str, Set[str]], *, lenient: bool) -> None:
        self.known, self.lenient = known, lenient
        self.data: Tree = {}
        self.origin: dict[KeyPath, tuple[Document, KeyPath]] = {}
        self.locked: dict[KeyPath, Any] = {}
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def add(self, folder: Path) -> bool:
        """Merge the files of one folder over what is there; return whether it has any."""
        for path in sorted(folder.glob("*.y*ml")):
            if path.suffix == ".yml" and path.stem in FILES:
                self.problems.append(Problem(str(path), 0, "", f"is not read. Rename it to {path.stem}.yaml."))
            elif path.stem not in _READ and (near := get_close_matches(path.stem.lower(), _READ, n=1, cutoff=0.85)):
                self.warnings.append(Problem(str(path), 0, "", "is not read.", f"Did you mean {near[0]}.yaml?"))
        files = [path for path in (folder / f"{name}.yaml" for name in FILES) if path.exists()]
        for path in files:
            self._add(read(path))
        return bool(files)

    def _add(self, document: Document) -> None:
        lenient = self.lenient or not is_off(document.value.get("lenient", "no"))
        tree = Translator(document, self.known, lenient).section("", document.value) or {}
        locks: Tree = tree.pop("locked", {})
        tree.pop("lenient", None)
        if is_off(tree.pop("inherit", None)):
            self._forget(tree)
        self._merge(tree, document, (), ())
        self._merge(locks, document, (), ("locked",))
        self.locked |= dict(_leaves(locks))
        self.problems += document.problems
        self.warnings += document.warnings

    def _forget(self, sections: Iterable[str]) -> None:
        """Drop what earlier layers wrote in these sections, except what they locked."""
        for section in {*sections} - {*SCALARS}:
            self.data.pop(section, None)
        for path, value in self.locked.items():
            node = self.data
            for part in path[:-1]:
                node = node.setdefault(str(part), {})
            node[str(path[-1])] = value

    def _merge(self, tree: Tree, document: Document, path: KeyPath, at: KeyPath) -> None:
        """Merge what the document has at `at` into the node at `path`."""
        node = self.data
        for part in path:
            node = node[str(part)]
        for group in _ALTERNATIVES:
            if any(tree.get(key) is not None for key in group):
                for key in group:
                    if key not in tree and (*path, key) not in self.locked:
                        node.pop(key, None)
        for key, value in tree.items():
            there, source, old = (*path, key), (*at, key), node.get(key)
            if key == "data_policy" and _strictness(value) < _strictness(old):
                continue  # no later layer loosens it
            if isinstance(value, dict) and isinstance(old, dict | None) and there not in self.locked:
                node[key] = cast("Tree", old or {})
                self.origin[there] = (document, source)
                self._merge(cast("Tree", value), document, there, source)
            elif isinstance(old, dict):
                document.problems.append(document.problem(source, NO_MAPPING))
            elif there in self.locked and value != old and key != "data_policy":
                where = f"is locked by {self.where(there)}."
                document.problems.append(document.problem(source, where, "Remove it."))
            else:
                node[key] = value
                self.origin[there] = (document, source)

    def problem(self, path: KeyPath, message: str, hint: str | None = None) -> Problem:
        """Return a problem of the merged tree, at the file and line that wrote it."""
        start = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.origin), None)
        if start is None:
            return Problem("configuration", 0, dotted(path), message, hint)
        document, at = self.origin[start]
        line = document.line((*at, *path[len(start) :]))
        return Problem(document.file, line, dotted(path), message, hint)

    def report(self, path: KeyPath, message: str, hint: str | None = None) -> None:
        """Add a problem of the merged tree."""
        self.problems.append(self.problem(path, message, hint))

    def where(self, path: KeyPath) -> str:
        """Return "file:line" of a value."""
        found = self.problem(path, "")
        return f"{found.file}:{found.line}"

    def values(self) -> dict[KeyPath, Any]:
        """Return every value that a file wrote, by its path."""
        return {path: value for path, value in _leaves(self.data) if path in self.origin}

    def remove_disabled(self) -> None:
        """Remove the entries with `enabled: false`, and disabled models from the lists of their providers."""
        off: dict[str, Tree] = {}
        for section in ENTRIES:
            entries: dict[str, Tree] = self.data.setdefault(section, {})
            off[section] = {name: entries.pop(name) for name in list(entries) if is_off(entries[name].get("enabled"))}
            for name in [name for name, entry in off[section].items() if entry.keys() == {"enabled"}]:
                hint = nearest(name, [*entries, *(off[section].keys() - {name})]) or None
                self.warnings.append(self.problem((section, name), "disables an entry that does not exist.", hint))
        for name, provider in self.data["providers"].items():
            if isinstance(provider.get("models"), list):
                at = ("providers", name, "models")
                document, source = self.origin[at]
                listed, disabled = provider["models"], list(off["models"])
                kept = [place for place, model in enumerate(listed) if model not in disabled]
                provider["models"] = [listed[place] for place in kept]
                self.origin |= {(*at, new): (document, (*source, old)) for new, old in enumerate(kept)}


def _strictness(policy: object) -> int:
    return 0 if policy is None else DATA_POLICIES.index(policy) if policy in DATA_POLICIES else len(DATA_POLICIES)


def _leaves(tree: Tree, path: KeyPath = ()) -> Iterable[tuple[KeyPath, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(cast("Tree", value), (*path, key))
        else:
            yield (*path, key), value
