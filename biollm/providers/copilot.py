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
from typing import TYPE_CHECKING, Any, cast

from biollm._files import locked, write_private
from biollm._ownership import in_the_clear
from biollm.config.paths import own_dir
from biollm.errors import UnavailableError

if TYPE_CHECKING:
    import httpx

_RENEW = 120.0  # seconds before its end from which a token is exchanged for a new one
_TIMEOUT = 10.0  # seconds for each exchange with GitHub
_REFUSED = (401, 403, 404)  # GitHub's answers to a login that has ended or has no Copilot
_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
# What the editor's plugin sends, without which GitHub refuses (the values of LiteLLM 1.106's github_copilot).
_EDITOR = {"editor-version": "vscode/1.95.0", "editor-plugin-version": "copilot-chat/0.26.7"}
_AGENT = {**_EDITOR, "user-agent": "GitHubCopilotChat/0.26.7", "accept": "application/json"}
HEADERS = {
    **_EDITOR,
    "copilot-integration-id": "vscode-chat",
    "openai-intent": "conversation-panel",
    "x-github-api-version": "2025-04-01",
}


def _setting(name: str, default: str) -> str:
    return field(default_factory=lambda: os.environ.get(f"GITHUB_COPILOT_{name}") or default)


@dataclass(frozen=True)
class Endpoints:
    """Where GitHub answers; GITHUB_COPILOT_... variables (LiteLLM's names) replace an address."""

    client_id: str = _setting("CLIENT_ID", "Iv1.b507a08c87ecfe98")
    device_code: str = _setting("DEVICE_CODE_URL", "https://github.com/login/device/code")
    access_token: str = _setting("ACCESS_TOKEN_URL", "https://github.com/login/oauth/access_token")
    api_key: str = _setting("API_KEY_URL", "https://api.github.com/copilot_internal/v2/token")
    api: str = _setting("API_BASE", "https://api.githubcopilot.com")


@dataclass(frozen=True)
class Token:
    """A short-lived token. `expires_at` is in epoch seconds; `base_url` is where requests go."""

    secret: str = field(repr=False)
    expires_at: float
    base_url: str


def login(
    account: str, state: Path, *, show: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Log `account` in: show a code for GitHub's page, wait until it is entered there, keep the token (0600).

    Args:
        account: Name of the account in providers.yaml.
        state: Folder under which the account's own folder lies.
        show: Called once with the sentence that tells the user what to do.
        sleep: Waits some seconds.

    Raises:
        UnavailableError: Refused, expired, not a Copilot account, or GitHub cannot be reached.
    """
    import httpx

    at = Endpoints()
    if exposed := _exposed(at.access_token):
        raise UnavailableError(exposed)
    try:
        with httpx.Client(headers=_AGENT, timeout=_TIMEOUT) as client:
            started = _json(client.post(at.device_code, data={"client_id": at.client_id, "scope": "read:user"}))
            if not {"device_code", "user_code", "verification_uri"} <= started.keys():
                raise UnavailableError("GitHub did not offer a login code.", hint="Try again later.")
            show(f"Open {started['verification_uri']} and enter the code {started['user_code']}")
            secret = _consent(client, at, started, sleep)
    except httpx.HTTPError as error:
        raise UnavailableError(f"GitHub cannot be reached: {str(error) or type(error).__name__}.") from None
    folder = _folder(state, account)
    write_private(folder / "access-token", secret)
    (folder / "api-key.json").unlink(missing_ok=True)
    found = token(account, state)
    if isinstance(found, str):
        raise UnavailableError(f"Logged in, but {found}")


def _consent(client: httpx.Client, at: Endpoints, started: dict[str, Any], sleep: Callable[[float], None]) -> str:
    """Ask at the interval that GitHub wants until the code is entered; return the access token."""
    wait, left = float(started.get("interval", 5)), float(started.get("expires_in", 900))
    form = {"client_id": at.client_id, "device_code": started["device_code"], "grant_type": _GRANT}
    while left > 0:
        sleep(wait)
        left -= wait
        answer = _json(client.post(at.access_token, data=form))
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
    """Return a token that is good for two more minutes, exchanging the login for a new one where needed.

    Blocks for seconds at the most, when it exchanges; of several processes one does. With `exchange=False`
    nothing is sent: a login without a good token is then a Token that has expired.

    Returns:
        The token, or one sentence why there is none and how to mend it.
    """
    folder = _folder(state, account)
    at = Endpoints()
    if not _read(folder / "access-token").strip():
        return f"not logged in: biollm login github_copilot --account {account}"
    kept = _kept(folder, at)
    if kept.expires_at > time.time() + _RENEW or not exchange:
        return kept
    try:
        with locked(folder / ".lock"):
            kept = _kept(folder, at)  # perhaps another process was quicker
            return kept if kept.expires_at > time.time() + _RENEW else _exchange(folder, account, at, kept)
    except OSError as error:
        return f"the folder {folder} cannot keep a Copilot token: {error.strerror}"


def _exposed(url: str) -> str | None:
    """Return why no login goes to an address, one sentence, or None: others could read it on the way."""
    return f"no login is sent over plain http:// to {url}: write https://" if in_the_clear(url, ()) else None


def _exchange(folder: Path, account: str, at: Endpoints, kept: Token) -> Token | str:
    import httpx

    if exposed := _exposed(at.api_key):
        return exposed
    headers = {**_AGENT, "authorization": f"token {_read(folder / 'access-token').strip()}"}
    try:
        answer = httpx.get(at.api_key, headers=headers, timeout=_TIMEOUT)
    except httpx.HTTPError as error:
        status, problem = 0, f"GitHub cannot be reached for a Copilot token: {str(error) or type(error).__name__}"
    else:
        if fresh := _token(answer.text, at):
            write_private(folder / "api-key.json", answer.text)
            return fresh
        status, problem = answer.status_code, _refusal(answer.status_code, account)
    return kept if kept.expires_at > time.time() and status not in _REFUSED else problem


def _refusal(status: int, account: str) -> str:
    if status == 401:
        return f"GitHub no longer accepts the login: biollm login github_copilot --account {account}"
    if status in _REFUSED:
        return f"the GitHub login {account!r} has no Copilot subscription (HTTP {status})"
    return f"GitHub gave no Copilot token (HTTP {status})"


def _kept(folder: Path, at: Endpoints) -> Token:
    """Return the token of the last exchange; where there is none, one that has expired."""
    return _token(_read(folder / "api-key.json"), at) or Token("", 0.0, at.api)


def _token(text: str, at: Endpoints) -> Token | None:
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        body: Any = json.loads(text)
        if secret := str(body["token"]):
            return Token(secret, float(body["expires_at"]), body.get("endpoints", {}).get("api") or at.api)
    return None


def _folder(state: Path, account: str) -> Path:
    return own_dir(state) / "github_copilot" / account


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _json(answer: httpx.Response) -> dict[str, Any]:
    """Return the answer's JSON object; an empty one where it is something else."""
    try:
        body: object = answer.json()
    except ValueError:
        return {}
    return cast(dict[str, Any], body) if isinstance(body, dict) else {}
