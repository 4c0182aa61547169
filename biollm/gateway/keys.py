"""The keys of the gateway's TCP port: what each may do and use, in gateway_keys.yaml.

LiteLLM's proxy keeps further keys, and what they spend, in Postgres. Here the file has the keys, or only their hashes,
and the ledger counts: with a ledger on Redis, over all gateways.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import stat
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import yaml as pyyaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from biollm._files import locked, write_private
from biollm._ownership import is_private
from biollm.config import values, yaml
from biollm.config.loader import sentence
from biollm.config.paths import config_dirs, state_dir
from biollm.errors import ConfigError, Problem, UsageError, nearest
from biollm.ledger import Claim
from biollm.providers import gateway_key
from biollm.providers.gateway_key import KEYS, SHORTEST

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_OURS = ("environment", "random")  # of BIOLLM_GATEWAY_KEY, and of the file in the state folder
_log = logging.getLogger("biollm")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)
    key: str = Field(min_length=SHORTEST)
    tags: dict[str, str] = {}
    rate_limit: values.Requests = ()
    token_limit: values.Tokens = ()
    token_budget: values.Tokens = ()
    budget: values.Dollars = ()
    resets: values.Resets = None
    start_local: bool = False
    pages: bool | None = None


@dataclass(frozen=True)
class Key:
    """A key: its limits, the tags of its usage records, and whether it may start servers on Slurm.

    `pages`: whether it opens the pages and metrics, which show what everybody uses; by default not where the file has
    only its hash, which is how keys are made for others. A key derived for an agent also has a data policy and an expiry, in epoch seconds. `secret` is "" where the file has
    only the key's hash: then no agent's key can be derived from it.
    """

    name: str
    secret: str = field(repr=False)
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    limits: Sequence[values.Limit] = ()
    start_local: bool = False
    policy: str = "any"
    expires: float = math.inf
    hashed: bytes = field(default=b"", repr=False)
    pages: bool = True

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the key."""
        return self.hashed or sha256(self.secret.encode()).digest()

    @cached_property
    def requests(self) -> Claim:
        """Return what a request claims of the key's limits of requests."""
        return Claim(f"gateway/{self.name}", tuple(each for each in self.limits if each.kind == "requests"))

    @cached_property
    def usage(self) -> Claim:
        """Return what it claims of the limits of tokens and money, which its attempts are charged to."""
        return Claim(f"key/{self.name}", tuple(each for each in self.limits if each.kind != "requests"))


def keys(*, may_be_empty: bool = False) -> tuple[tuple[Key, ...], str]:
    """Return the keys and their source: BIOLLM_GATEWAY_KEY, gateway_keys.yaml, or a random key in a file of its own.

    The random key is among them too where the others are only hashes: agents' keys are derived from it.

    Raises:
        ConfigError: gateway_keys.yaml is invalid or others can read it, or BIOLLM_GATEWAY_KEY is too short.
    """
    found: list[Key] = []
    source = "BIOLLM_GATEWAY_KEY"
    if key := os.environ.get("BIOLLM_GATEWAY_KEY"):
        if len(key := key.strip()) < SHORTEST:
            why, hint = f"has fewer than {SHORTEST} characters.", "Make one: openssl rand -hex 16."
            raise ConfigError([Problem("BIOLLM_GATEWAY_KEY", 0, "", why, hint)])
        found.append(Key(_OURS[0], key))
    if (file := _file()).exists():
        listed, source = _read(file), str(file)
        if not listed and not may_be_empty:
            raise ConfigError([Problem(source, 0, "", "holds no key.", "Write NAME: {key: ...}.")])
        found = [*listed, *found]  # the file's entry wins where both hold the same key: it says what the key may do
    if not any(key.secret for key in found):
        file = gateway_key.random_key_file(state_dir())
        source = source if found or may_be_empty else str(file)
        found.append(Key(_OURS[1], _random(file)))
    return tuple(found), source


def listed() -> Sequence[Key]:
    """Return the keys of gateway_keys.yaml.

    Raises:
        ConfigError: It is invalid.
    """
    return _read(_file()) if _file().exists() else ()


class Known:
    """The keys, read again when gateway_keys.yaml changes: one that is revoked there is refused at once."""

    def __init__(self, known: Sequence[Key]) -> None:
        self._known, self._file, self._at = known, _file(), _time(_file())

    def __call__(self) -> Sequence[Key]:
        """Return the keys as they are now; those before while the file has an error."""
        if (at := _time(self._file)) != self._at:
            self._at = at
            try:
                self._known = keys(may_be_empty=True)[0]
            except ConfigError as error:
                _log.warning("The gateway's keys stay as they were: %s", error)
        return self._known


def add(name: str, entry: Mapping[str, Any]) -> tuple[str, Path]:
    """Make a key, write its hash and `entry` to gateway_keys.yaml, and return it with the file.

    Raises:
        UsageError: There is such a key, or the entry is invalid.
        ConfigError: The file is.
    """
    key = secrets.token_urlsafe(32)
    written = {"key": f"sha256:{sha256(key.encode()).hexdigest()}", **entry}
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"{name!r} cannot be a key's name.", hint="Use letters, digits, dots, dashes and underscores.")
    if name in _OURS:
        raise UsageError(f"{name!r} is the name of a key of the gateway itself.", hint="Choose another name.")
    with _edited() as (file, old):
        if there := _names(old):
            listed()  # which raises for a wrong entry
        if name in there:
            raise UsageError(
                f"{file} has a key named {name!r} already.", hint="Give it another name, or revoke that one."
            )
        try:
            _Entry.model_validate(written)
        except ValidationError as error:
            each = error.errors(include_url=False)[0]
            raise UsageError(f"--{str(each['loc'][0]).replace('_', '-')}: {sentence(each)}") from None
        old = old.rstrip().removesuffix("{}")
        text = pyyaml.safe_dump({name: written}, sort_keys=False, allow_unicode=True)
        _replace(file, f"{old.rstrip()}\n{text}".lstrip(), {*there, name})
    return key, file


def revoke(name: str) -> Path:
    """Remove a key from gateway_keys.yaml, leaving every comment there in place, and return the file.

    Raises:
        UsageError: There is no such key.
    """
    with _edited() as (file, old):
        if name not in (there := _names(old)):
            hint = nearest(name, there) or (f"There are: {', '.join(there)}." if there else "There is none.")
            raise UsageError(f"{file} has no key named {name!r}.", hint=hint)
        lines, starts = old.splitlines(keepends=True), list(there.values())
        end = next((at for at in starts if at > there[name]), len(lines))
        while not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#"):
            end -= 1  # a comment above the next key is about that one
        rest = "".join([*lines[: there[name]], *lines[end:]])
        _replace(file, rest if len(there) > 1 else f"{rest}{{}}\n", there.keys() - {name})
    return file


def _file() -> Path:
    """Return gateway_keys.yaml of the last layer that has one, else of the last layer."""
    files = [folder / KEYS for _, folder in reversed(config_dirs())]
    return next((file for file in files if file.exists()), files[0])


@contextmanager
def _edited() -> Generator[tuple[Path, str]]:
    """Yield gateway_keys.yaml and its text, which no other command changes meanwhile."""
    with locked(gateway_key.random_key_file(state_dir()).with_name("gateway_keys.lock")):
        file = _file().resolve()
        try:
            text = file.read_text() if file.exists() else ""
            _names(text)
        except (ValueError, TypeError, pyyaml.YAMLError):
            raise ConfigError(yaml.read(file).problems) from None
        yield file, text


def _names(text: str) -> dict[str, int]:
    """Return each name at the top of a YAML file, and the line on which it begins."""
    root: Any = cast("Any", pyyaml).compose(text, pyyaml.SafeLoader)
    return {} if root is None else {key.value: key.start_mark.line for key, _ in root.value}


def _replace(file: Path, text: str, expected: Set[str]) -> None:
    """Write the file, if it then has the keys that it should."""
    try:
        good = _names(text).keys() == expected
    except pyyaml.YAMLError:
        good = False
    if not good:
        raise UsageError(f"{file} is not written with each key on lines of its own: change it by hand.")
    write_private(file, text)


def _time(file: Path) -> tuple[int, int] | None:
    try:
        at = file.stat()
    except OSError:
        return None
    return at.st_mtime_ns, at.st_ino


def _random(file: Path) -> str:
    """Return the key in `file`; write a new one unless it holds a whole key that only this user can read."""
    with locked(file.with_name("gateway.key.lock")):
        key = file.read_text(errors="replace").strip() if is_private(file, stat.S_ISREG) else ""
        if len(key) < SHORTEST or not re.fullmatch("[!-~]+", key):
            if file.exists():  # a full disk or a crash can leave it empty
                _log.warning("%s did not hold a complete, private key; it now has a new one.", file)
            key = secrets.token_urlsafe(32)
            write_private(file, f"{key}\n")
    return key


def _read(file: Path) -> list[Key]:
    if not is_private(file, stat.S_ISREG):
        raise ConfigError([Problem(str(file), 0, "", "holds keys and can be read by others.", f"chmod 600 {file}")])
    document = yaml.read(file)
    problems, found = list(document.problems), list[Key]()
    for name, value in document.value.items():
        try:
            entry = _Entry.model_validate(value)
        except ValidationError as error:  # its own text would show the key
            for each in error.errors(include_input=False, include_url=False):
                key = str(each["loc"][0]) if each["type"] == "extra_forbidden" else ""
                known = _Entry.model_fields
                hint = key and (nearest(key, known) or f"Known: {', '.join(known)}.")
                problems.append(document.problem((name, *each["loc"][:1]), sentence(each), hint or None))
        else:
            found.append(_key(name, entry))
    if problems:
        raise ConfigError(problems)
    return found


def _key(name: str, entry: _Entry) -> Key:
    hashed = _HASHED.fullmatch(entry.key)
    listed = (*entry.rate_limit, *entry.token_limit, *entry.token_budget, *entry.budget)
    limits = [replace(each, resets=None if each.rolling else entry.resets) for each in listed]
    secret, digest = ("", bytes.fromhex(hashed[1])) if hashed else (entry.key, b"")
    pages = not hashed if entry.pages is None else entry.pages
    return Key(name, secret, entry.tags, limits, entry.start_local, hashed=digest, pages=pages)
