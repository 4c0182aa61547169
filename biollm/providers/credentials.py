"""Finds the secret of one account: its own variable, its own file, or its Copilot token, and no other.

LiteLLM falls back to variables such as OPENAI_API_KEY when a deployment has no key, and would send that key
to whatever host the deployment names. So every key is found here, before a Router exists.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from biollm.providers import copilot
from biollm.providers.gateway_key import is_gateway_key

if TYPE_CHECKING:
    from biollm.config import Account, Config, Provider
    from biollm.errors import Problem

_SALT = b"biollm key fingerprint 1:"
_LOOP = "holds a key of biollm's own gateway, which cannot be its own provider"


@dataclass(frozen=True)
class Credential:
    """What a request to a deployment needs. The secret is not part of the repr."""

    secret: str = ""  # the key; "" where none is needed
    headers: dict[str, str] = field(default_factory=dict[str, str])  # further headers that the provider requires
    base_url: str | None = None  # where this account's requests go, if not to the provider's address
    expires_at: float | None = None  # epoch seconds; None for keys that last

    def __repr__(self) -> str:
        return f"Credential(fingerprint={self.fingerprint!r}, base_url={self.base_url!r})"

    @property
    def fingerprint(self) -> str:
        """Return a short salted hash that identifies the key and may be stored; "" without a key."""
        return hashlib.sha256(_SALT + self.secret.encode()).hexdigest()[:12] if self.secret else ""

    def ends_within(self, seconds: float) -> bool:
        """Return whether it is short-lived and expires within `seconds`; 0: whether it has expired."""
        return self.expires_at is not None and self.expires_at <= time.time() + seconds


def hide(text: str, secrets: Iterable[str]) -> str:
    """Return `text` without these secrets, whole or cut short."""
    for secret in secrets:
        if len(secret) >= 6 and secret[:8] in text:
            text = re.sub(re.escape(secret[:8]) + r"[\w.=+/-]*", "***", text)
    return text


def find(provider: Provider, account: Account, state: Path, *, exchange: bool = True) -> Credential | str:
    """Return the account's credential, or one sentence: why there is none, and how to fix it.

    Files are read each time, so a new key counts at once. May block for seconds while a Copilot token is exchanged.
    With `exchange=False` nothing is sent, and a credential that needs an exchange has expired.
    """
    if account.env_key and (secret := os.environ.get(account.env_key, "").strip()):
        if is_gateway_key(secret, state):
            return f"{account.env_key} {_LOOP}: set it to a key of {provider.name}, or unset it"
        return _checked(secret, account.env_key)
    if account.key_file:
        return _from_file(account.key_file.expanduser())
    if account.env_key:
        return f"no key: set {account.env_key}"
    if provider.litellm_provider == "github_copilot":
        found = copilot.token(account.name, state, exchange=exchange)
        if isinstance(found, str):
            return found
        return Credential(found.secret, copilot.HEADERS, found.base_url, found.expires_at)
    if provider.type == "api":
        return f"no key: give {provider.name} an env_key or a key_file in providers.yaml"
    return Credential()


def origin(account: Account) -> str:
    """Return what holds the account's key: a variable's name, or a file; "" where it has none."""
    if account.env_key and (not account.key_file or os.environ.get(account.env_key, "").strip()):
        return account.env_key
    return str(account.key_file or "")


def loops(config: Config, state: Path) -> list[Problem]:
    """Return the providers whose variable holds a key of biollm's own gateway."""
    return [
        config.problem(
            f"providers.{provider.name}.env_key", f"{account.env_key} {_LOOP}.", "Set the provider's own key."
        )
        for provider in config.providers
        for account in provider.accounts
        if account.env_key and is_gateway_key(os.environ.get(account.env_key, "").strip(), state)
    ]


def unreadable(config: Config) -> list[Problem]:
    """Return the key files that cannot be used."""
    files = {(provider.name, account.key_file) for provider in config.providers for account in provider.accounts}
    return [
        config.problem(f"providers.{name}.key_file", f"{found}.")
        for name, file in sorted(files, key=str)
        if file and isinstance(found := _from_file(file), str)
    ]


def _checked(secret: str, where: str | Path) -> Credential | str:
    if secret.isascii() and len(secret.split()) == 1:
        return Credential(secret)
    return f"{where} must hold one key and nothing else: it is empty, or has spaces, lines or non-ASCII characters"


def _from_file(path: Path) -> Credential | str:
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            secret = file.read(65536).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        return f"the key file {path} cannot be read: {reason}"
    if status.st_uid != os.getuid():
        return f"the key file {path} belongs to another user: use one of your own"
    if status.st_mode & 0o177:
        return f"the key file {path} is open to others: chmod 600 {shlex.quote(str(path))}"
    return _checked(secret, path)
