"""Keys of biollm's own gateway: one derived for each agent, and a check that a provider's variable holds none of them.

LiteLLM's proxy keeps further keys in Postgres. A derived key needs no storage: it states its agent, data policy and
expiry, and is signed with a key of the gateway.
"""

from __future__ import annotations

import hmac
import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from biollm.config.paths import config_dirs, own_dir

KEYS = "gateway_keys.yaml"
SHORTEST = 16  # characters of a key
_DERIVED = "biollm-agent."


@dataclass(frozen=True)
class Grant:
    """What a derived key states: the agent whose usage it tags, its data policy, and its expiry in epoch seconds."""

    agent: str
    policy: str
    expires: int


def derive(secret: str, grant: Grant) -> str:
    """Return a key with this grant, signed with a key of the gateway."""
    text = f"{_DERIVED}{grant.agent}.{grant.policy}.{grant.expires}"
    return f"{text}.{_signature(secret, text)}"


def verified(given: str, secret: str) -> Grant | None:
    """Return the grant of a key that was derived from `secret`, expired or not; None for any other key."""
    text, _, signature = given.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(secret, text).encode()):
        return None
    agent, policy, expires = text.removeprefix(_DERIVED).split(".")
    return Grant(agent, policy, int(expires))


def _signature(secret: str, text: str) -> str:
    return hmac.digest(secret.encode(), text.encode(), "sha256").hex()


def random_key_file(state: Path) -> Path:
    """Return the file of the key that the gateway makes where it is given none."""
    return own_dir(state) / "gateway.key"


def is_gateway_key(secret: str, state: Path) -> bool:
    """Return whether this user's gateway takes `secret` as a key, so that a request with it would come back here."""
    if len(secret) < SHORTEST:
        return False
    if secret.startswith(_DERIVED) or secret == os.environ.get("BIOLLM_GATEWAY_KEY"):
        return True
    for file in (random_key_file(state), *(folder / KEYS for _, folder in config_dirs())):
        with suppress(OSError, UnicodeDecodeError):
            text = file.read_text()
            if secret in text or sha256(secret.encode()).hexdigest() in text:
                return True
    return False
