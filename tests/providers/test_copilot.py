"""Copilot accounts against a server that speaks GitHub's documented device flow and token exchange."""

from __future__ import annotations

import json
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from behaviours import limited
from provider import Loopback

from biollm.client import get_model_client
from biollm.config import Account, Provider
from biollm.errors import UnavailableError
from biollm.providers import copilot, credentials
from biollm.providers.copilot import Token
from biollm.providers.credentials import Credential
from biollm.routing.health import check_all_providers

LOGIN, DEVICE = "gho_planted_login_0123456789", "device-0123456789"
WAIT = {"error": "authorization_pending"}
Poll = dict[str, Any]


@dataclass
class GitHub:
    """GitHub's three addresses; every request is checked as GitHub would."""

    polls: list[Poll] = field(default_factory=lambda: [{"access_token": LOGIN, "token_type": "bearer"}])
    started: Poll = field(default_factory=lambda: {"interval": 5, "expires_in": 900})
    exchange: int | str = 200
    lasts: float = 1500.0
    exchanges: int = 0
    url: str = ""
    api: str = "https://api"

    def answer(self, method: str, path: str, form: dict[str, str], headers: dict[str, str]) -> tuple[int, Any]:
        match method, path:
            case "POST", "/device":
                assert form == {"client_id": "Iv1.b507a08c87ecfe98", "scope": "read:user"}
                code = {"device_code": DEVICE, "user_code": "ABCD-1234", "verification_uri": f"{self.url}/page"}
                return 200, self.started if "error" in self.started else {**code, **self.started}
            case "POST", "/access":
                assert form["device_code"] == DEVICE
                assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:device_code"
                return 200, self.polls.pop(0)
            case "GET", "/token":
                assert headers["authorization"] == f"token {LOGIN}"
                assert {"editor-version", "editor-plugin-version", "user-agent"} <= headers.keys()
                self.exchanges += 1
                if self.exchange != 200:
                    return (
                        (self.exchange, {"message": "no"}) if isinstance(self.exchange, int) else (200, self.exchange)
                    )
                token = f"tid=planted-{self.exchanges};exp=1"
                return 200, {
                    "token": token,
                    "expires_at": int(time.time() + self.lasts),
                    "endpoints": {"api": self.api},
                }
            case _:
                raise AssertionError(f"GitHub was asked for {method} {path}")


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHub]:
    hub = GitHub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            text = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
            form = {name: values[0] for name, values in parse_qs(text).items()}
            status, body = hub.answer(
                self.command, self.path, form, {name.lower(): value for name, value in self.headers.items()}
            )
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _serve  # noqa: N815

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("GITHUB_COPILOT_DEVICE_CODE_URL", f"{hub.url}/device")
        monkeypatch.setenv("GITHUB_COPILOT_ACCESS_TOKEN_URL", f"{hub.url}/access")
        monkeypatch.setenv("GITHUB_COPILOT_API_KEY_URL", f"{hub.url}/token")
        yield hub
        server.shutdown()


@pytest.fixture
def logged_in(github: GitHub, state: Path) -> GitHub:
    login(state)
    return github


def login(state: Path, account: str = "lab") -> list[float]:
    """Log in with a clock of the test's own; return how long each wait was."""
    waits: list[float] = []
    copilot.login(account, state, show=lambda text: None, sleep=waits.append)
    return waits


def keep(state: Path, seconds: float, secret: str = "tid=kept") -> None:
    """Put a token that is good for so many more seconds where the last exchange left one."""
    body = {"token": secret, "expires_at": time.time() + seconds, "endpoints": {"api": "https://api"}}
    (state / "github_copilot" / "lab" / "api-key.json").write_text(json.dumps(body))


def secret(found: Token | str) -> str:
    assert isinstance(found, Token), found
    return found.secret


def test_login_shows_the_code_and_keeps_the_token_for_the_owner_alone(github: GitHub, state: Path) -> None:
    shown: list[str] = []
    github.polls = [WAIT, WAIT, *github.polls]
    copilot.login("lab", state, show=shown.append, sleep=lambda seconds: None)
    assert shown == [f"Open {github.url}/page and enter the code ABCD-1234"]
    folder = state / "github_copilot" / "lab"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"access-token": 0o600, "api-key.json": 0o600, ".lock": 0o600}
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder, folder.parent, state)} == {0o700}


def test_a_kept_token_that_is_empty_is_none(github: GitHub, state: Path) -> None:
    copilot.login("lab", state, show=lambda text: None, sleep=lambda seconds: None)
    keep(state, 1500, "")
    assert secret(copilot.token("lab", state))


@pytest.mark.parametrize(
    ("polls", "waits"),
    [
        ([WAIT, WAIT], [5, 5, 5]),
        ([{"error": "slow_down", "interval": 12}, WAIT], [5, 12, 12]),
        ([{"error": "slow_down"}, WAIT], [5, 10, 10]),
    ],
)
def test_login_polls_at_the_interval_that_github_asks_for(
    github: GitHub, state: Path, polls: list[Poll], waits: list[float]
) -> None:
    github.polls = [*polls, *github.polls]
    assert login(state) == waits


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"polls": [{"error": "expired_token"}]}, "The code expired before it was entered."),
        (
            {"polls": [WAIT] * 9, "started": {"interval": 5, "expires_in": 20}},
            "The code expired before it was entered.",
        ),
        ({"polls": [{"error": "access_denied"}]}, "GitHub refused the login: access_denied."),
        ({"polls": [{"error": "incorrect_client_credentials"}]}, "refused the login: incorrect_client_credentials."),
        ({"polls": [{}]}, "GitHub refused the login: None."),
        ({"started": {"error": "device_flow_disabled"}}, "GitHub did not offer a login code."),
        ({"exchange": 403}, "Logged in, but the GitHub login 'lab' has no Copilot subscription (HTTP 403)"),
    ],
)
def test_a_login_that_fails_says_why(github: GitHub, state: Path, change: dict[str, Any], says: str) -> None:
    for name, value in change.items():
        setattr(github, name, value)
    with pytest.raises(UnavailableError) as failure:
        login(state)
    assert says in str(failure.value)
    assert LOGIN not in str(failure.value)


def test_a_failed_login_leaves_the_old_one(logged_in: GitHub, state: Path) -> None:
    logged_in.polls = [{"error": "access_denied"}]
    with pytest.raises(UnavailableError):
        login(state)
    assert secret(copilot.token("lab", state)).startswith("tid=planted")


def test_without_a_login_the_account_is_skipped_and_nothing_is_asked(github: GitHub, state: Path) -> None:
    assert copilot.token("lab", state) == "not logged in: biollm login github_copilot --account lab"
    assert github.exchanges == 0
    assert not state.exists()


def test_accounts_are_apart(logged_in: GitHub, state: Path) -> None:
    assert isinstance(copilot.token("lab", state), Token)
    assert copilot.token("core", state) == "not logged in: biollm login github_copilot --account core"


@pytest.mark.parametrize(("left", "renewed"), [(1500, False), (130, False), (110, True), (-5, True)])
def test_a_token_is_renewed_two_minutes_before_it_ends(
    logged_in: GitHub, state: Path, left: float, renewed: bool
) -> None:
    keep(state, left)
    before = logged_in.exchanges
    assert (secret(copilot.token("lab", state)) != "tid=kept") is renewed
    assert logged_in.exchanges - before == renewed


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "x"}', '{"token": "x", "expires_at": "soon"}', "\0"])
def test_a_spoilt_token_file_is_replaced(logged_in: GitHub, state: Path, text: str) -> None:
    (state / "github_copilot" / "lab" / "api-key.json").write_text(text)
    assert secret(copilot.token("lab", state)) == "tid=planted-2;exp=1"
    assert secret(copilot.token("lab", state)) == "tid=planted-2;exp=1"


def test_many_at_once_exchange_once(logged_in: GitHub, state: Path) -> None:
    keep(state, 10)
    before = logged_in.exchanges
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: secret(copilot.token("lab", state)), range(8)))
    assert logged_in.exchanges == before + 1
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (401, "GitHub no longer accepts the login: biollm login github_copilot --account lab"),
        (403, "the GitHub login 'lab' has no Copilot subscription (HTTP 403)"),
        (404, "the GitHub login 'lab' has no Copilot subscription (HTTP 404)"),
        (500, "GitHub gave no Copilot token (HTTP 500)"),
        ("<html>proxy</html>", "GitHub gave no Copilot token (HTTP 200)"),
        ("[]", "GitHub gave no Copilot token (HTTP 200)"),
        ('{"token": "x"}', "GitHub gave no Copilot token (HTTP 200)"),
    ],
)
def test_a_refused_exchange_is_one_sentence(logged_in: GitHub, state: Path, answer: int | str, says: str) -> None:
    keep(state, -1)
    logged_in.exchange = answer
    assert copilot.token("lab", state) == says


@pytest.mark.parametrize(("answer", "kept"), [(500, True), (429, True), ("<html>", True), (401, False), (403, False)])
def test_a_token_serves_to_its_end_while_github_is_ill(
    logged_in: GitHub, state: Path, answer: int | str, kept: bool
) -> None:
    keep(state, 60)
    logged_in.exchange = answer
    assert isinstance(copilot.token("lab", state), Token) is kept


def test_a_github_that_cannot_be_reached_is_one_sentence(
    logged_in: GitHub, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_COPILOT_API_KEY_URL", "http://127.0.0.1:9/token")
    keep(state, 60)
    assert secret(copilot.token("lab", state)) == "tid=kept"
    keep(state, -1)
    found = copilot.token("lab", state)
    assert isinstance(found, str)
    assert found.startswith("GitHub cannot be reached for a Copilot token: ")


def test_a_folder_that_cannot_be_written_is_one_sentence(logged_in: GitHub, state: Path) -> None:
    folder = state / "github_copilot" / "lab"
    (folder / "api-key.json").unlink()
    (folder / "api-key.json").mkdir()
    assert copilot.token("lab", state) == f"the folder {folder} cannot keep a Copilot token: Is a directory"


def test_nothing_is_sent_where_an_exchange_may_not_block(logged_in: GitHub, state: Path) -> None:
    keep(state, 1500)
    assert secret(copilot.token("lab", state, exchange=False)) == "tid=kept"
    (state / "github_copilot" / "lab" / "api-key.json").unlink()
    assert copilot.token("lab", state, exchange=False) == Token("", 0.0, "https://api.githubcopilot.com")
    assert logged_in.exchanges == 1


def test_the_credential_carries_what_copilot_wants(logged_in: GitHub, state: Path) -> None:
    account = Account(name="lab")
    provider = Provider(name="github_copilot", type="api", accounts=(account,))
    found = credentials.find(provider, account, state)
    assert isinstance(found, Credential)
    assert found.headers.keys() == {
        *("copilot-integration-id", "editor-version", "editor-plugin-version", "openai-intent", "x-github-api-version")
    }
    assert found.base_url == "https://api"
    assert found.expires_at is not None
    assert found.expires_at > time.time()
    assert found.fingerprint
    shown = repr(found) + repr(copilot.token("lab", state))
    assert "planted" not in shown


@pytest.mark.parametrize(
    ("answer", "available", "exchanges"),
    [(200, True, 1), (401, False, 1)],
)
def test_an_account_idle_past_its_tokens_end_is_asked_with_a_new_one(
    logged_in: GitHub,
    state: Path,
    net: Loopback,
    waterfall: Callable[..., Path],
    answer: int,
    available: bool,
    exchanges: int,
) -> None:
    server = net.serve()
    logged_in.api = server.url
    waterfall(github_copilot={"accounts": [{"name": "lab"}]})
    keep(state, -1)
    logged_in.exchange, before = answer, logged_in.exchanges
    found = check_all_providers()["github_copilot"]
    assert (found["available"], logged_in.exchanges - before) == (available, exchanges)
    sent = [request.headers["authorization"] for request in server.requests]
    assert sent == (["Bearer tid=planted-2;exp=1"] if available else [])
    assert available or "no longer accepts the login" in found["error"]


def test_both_accounts_answer_each_with_its_own_token_and_the_headers(
    github: GitHub, state: Path, net: Loopback, waterfall: Callable[..., Path]
) -> None:
    server = net.serve(limited("300"), text="fine")
    github.api, github.polls = server.url, [*github.polls, *github.polls]
    login(state, "lab")
    login(state, "core")
    waterfall(github_copilot={"accounts": [{"name": "lab"}, {"name": "core"}]}, last=net.serve())
    answer = get_model_client().complete("hi")
    assert (answer.provider, answer.text, len(server.completions)) == ("github_copilot", "fine", 2)
    assert github.exchanges == 2, "each login has left a token"
    sent = [request.headers for request in server.completions]
    assert len({headers["authorization"] for headers in sent}) == 2
    assert all("copilot-integration-id" in headers for headers in sent)


def test_a_token_about_to_end_is_renewed_before_the_request(
    github: GitHub, state: Path, net: Loopback, waterfall: Callable[..., Path]
) -> None:
    server = net.serve(text="fine")
    github.api, github.lasts = server.url, 30.0
    login(state)
    waterfall(github_copilot={"accounts": [{"name": "lab"}]}, last=net.serve())
    client = get_model_client()
    client.complete("hi")
    client.complete("hi")
    first, second = (request.headers["authorization"] for request in server.completions)
    assert first != second


def test_a_rung_without_a_login_is_skipped_and_says_so(net: Loopback, waterfall: Callable[..., Path]) -> None:
    waterfall(github_copilot={"accounts": [{"name": "lab"}]}, last=net.serve())
    answer = get_model_client().complete("hi")
    assert answer.attempts[0].reason == "not logged in: biollm login github_copilot --account lab"
