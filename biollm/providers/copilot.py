"""GitHub Copilot accounts: the device-flow login, and the short-lived token that requests carry.

LiteLLM's `github_copilot` keeps one token folder for the whole process and starts a login when a token is
missing. Here accounts have folders of their own, tokens are renewed in time, and no request waits for a login.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biollm._files import locked, write_private
from biollm._ownership import in_the_clear
from biollm.config.paths import own_dir
from biollm.errors import UnavailableError

if TYPE_CHECKING:
    import httpx

_RENEW = 120.0  # seconds of validity below which a token is exchanged for a new one
_TIMEOUT = 10.0  # seconds for each request to GitHub
_REFUSED = (401, 403, 404)  # GitHub's statuses for a login that has ended or has no Copilot
_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
# The headers of the editor's plugin, without which GitHub refuses (the values of LiteLLM 1.106's github_copilot).
_EDITOR = {"editor-version": "vscode/1.95.0", "editor-plugin-version": "copilot-chat/0.26.7"}
_AGENT = {**_EDITOR, "user-agent": "GitHubCopilotChat/0.26.7", "accept": "application/json"}
HEADERS = {
    **_EDITOR,
    "copilot-integration-id": "vscode-chat",
    "openai-intent": "conversation-panel",
    "x-github-api-version": "2025-04-01",
}
# GITHUB_COPILOT_... variables (LiteLLM's names) and the values they replace.
_DEFAULTS = {
    "CLIENT_ID": "Iv1.b507a08c87ecfe98",
    "DEVICE_CODE_URL": "https://github.com/login/device/code",
    "ACCESS_TOKEN_URL": "https://github.com/login/oauth/access_token",
    "API_KEY_URL": "https://api.github.com/copilot_internal/v2/token",
    "API_BASE": "https://api.githubcopilot.com",
}


@dataclass(frozen=True)
class Token:
    """A short-lived token. `expires_at` is in epoch seconds; `base_url` is where requests go."""

    secret: str = field(repr=False)
    expires_at: float
    base_url: str


def login(
    account: str, state: Path, *, show: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Log `account` in: show a code for GitHub's page, wait until it is entered there, and store the token (0600)."""
    import httpx

    if exposed := _exposed(_setting("ACCESS_TOKEN_URL")):
        raise UnavailableError(exposed)
    form = {"client_id": _setting("CLIENT_ID"), "scope": "read:user"}
    try:
        with httpx.Client(headers=_AGENT, timeout=_TIMEOUT) as client:
            offered = _object(client.post(_setting("DEVICE_CODE_URL"), data=form).text)
            if not {"device_code", "user_code", "verification_uri"} <= offered.keys():
                raise UnavailableError("GitHub did not offer a login code.", hint="Try again later.")
            show(f"Open {offered['verification_uri']} and enter the code {offered['user_code']}")
            secret = _consent(client, offered, sleep)
    except httpx.HTTPError as error:
        raise UnavailableError(f"GitHub cannot be reached: {str(error) or type(error).__name__}.") from None
    folder = _folder(state, account)
    write_private(folder / "access-token", secret)
    (folder / "api-key.json").unlink(missing_ok=True)
    found = token(account, state)
    if isinstance(found, str):
        raise UnavailableError(f"Logged in, but {found}")


def _consent(client: httpx.Client, offered: dict[str, Any], sleep: Callable[[float], None]) -> str:
    """Poll at GitHub's interval until the code is entered; return the access token."""
    wait, left = float(offered.get("interval", 5)), float(offered.get("expires_in", 900))
    form = {"client_id": _setting("CLIENT_ID"), "device_code": offered["device_code"], "grant_type": _GRANT}
    while left > 0:
        sleep(wait)
        left -= wait
        answer = _object(client.post(_setting("ACCESS_TOKEN_URL"), data=form).text)
        if secret := answer.get("access_token"):
            return str(secret)
        match answer.get("error"):
            case "authorization_pending":
                continue
            case "slow_down":
                wait = float(answer.get("interval", wait + 5))
            case "expired_token":
                break
            case other:  # access_denied: refused on GitHub's page
                raise UnavailableError(f"GitHub refused the login: {str(other)[:80]}.")
    raise UnavailableError("The code expired before it was entered.", hint="Run the login again.")


def token(account: str, state: Path, *, exchange: bool = True) -> Token | str:
    """Return a token that is valid for two more minutes, or one sentence: why there is none, and how to fix it.

    Where needed, the login is exchanged for a new token, by one of several processes, which blocks for seconds. With
    `exchange=False` nothing is sent: a login without a valid token is then a Token that has expired.
    """
    folder = _folder(state, account)
    if not _read(folder / "access-token").strip():
        return f"not logged in: biollm login github_copilot --account {account}"
    kept = _kept(folder)
    if kept.expires_at > time.time() + _RENEW or not exchange:
        return kept
    try:
        with locked(folder / ".lock"):
            kept = _kept(folder)  # another process may have been quicker
            return kept if kept.expires_at > time.time() + _RENEW else _exchange(folder, account, kept)
    except OSError as error:
        return f"the folder {folder} cannot keep a Copilot token: {error.strerror}"


def _exchange(folder: Path, account: str, kept: Token) -> Token | str:
    import httpx

    url = _setting("API_KEY_URL")
    if exposed := _exposed(url):
        return exposed
    headers = {**_AGENT, "authorization": f"token {_read(folder / 'access-token').strip()}"}
    try:
        answer = httpx.get(url, headers=headers, timeout=_TIMEOUT)
    except httpx.HTTPError as error:
        status, problem = 0, f"GitHub cannot be reached for a Copilot token: {str(error) or type(error).__name__}"
    else:
        if fresh := _token(answer.text):
            write_private(folder / "api-key.json", answer.text)
            return fresh
        status = answer.status_code
        if status == 401:
            problem = f"GitHub no longer accepts the login: biollm login github_copilot --account {account}"
        elif status in _REFUSED:
            problem = f"the GitHub login {account!r} has no Copilot subscription (HTTP {status})"
        else:
            problem = f"GitHub gave no Copilot token (HTTP {status})"
    return kept if kept.expires_at > time.time() and status not in _REFUSED else problem


def _kept(folder: Path) -> Token:
    """Return the token of the last exchange; where there is none, one that has expired."""
    return _token(_read(folder / "api-key.json")) or Token("", 0.0, _setting("API_BASE"))


def _token(text: str) -> Token | None:
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        body = _object(text)
        if secret := str(body["token"]):
            base_url = body.get("endpoints", {}).get("api") or _setting("API_BASE")
            return Token(secret, float(body["expires_at"]), base_url)
    return None


def _exposed(url: str) -> str | None:
    return f"no login is sent over plain http:// to {url}: write https://" if in_the_clear(url, ()) else None


def _setting(name: str) -> str:
    return os.environ.get(f"GITHUB_COPILOT_{name}") or _DEFAULTS[name]


def _folder(state: Path, account: str) -> Path:
    return own_dir(state) / "github_copilot" / account


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _object(text: str) -> dict[str, Any]:
    """Return a JSON object; an empty one where the text is something else."""
    with suppress(ValueError):
        body: Any = json.loads(text)
        if isinstance(body, dict):
            return body  # pyright: ignore[reportUnknownVariableType]
    return {}
