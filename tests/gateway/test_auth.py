"""Who may use the gateway's TCP port."""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import until
from provider import Loopback
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse

from biollm._runtime import ledger
from biollm.errors import ConfigError
from biollm.gateway import auth, keys
from biollm.providers.gateway_key import Grant, derive

Waterfall = Callable[..., Path]
ANN, BOB = "ann-0123456789abcdef", "bob-0123456789abcdef"
CHAT, HI = "/v1/chat/completions", {"model": "biollm", "messages": [{"role": "user", "content": "hi"}]}
KEYS = f"ann: {{key: {ANN}, tags: {{user: ann}}}}\nbob: {{key: {BOB}, rate_limit: 1/day}}\n"


@pytest.fixture
def url(net: Loopback, waterfall: Waterfall, gateway: Callable[..., dict[str, Any]]) -> Iterator[str]:
    """The address of a gateway with the keys of ann and bob."""
    folder = waterfall(first=net.serve(text="hello"))
    (folder / "gateway_keys.yaml").write_text(KEYS)
    (folder / "gateway_keys.yaml").chmod(0o600)
    return gateway("--port", "0")["url"]


def announced(url: str, path: str, size: int, headers: dict[str, str]) -> int:
    """Return the status for a body that was only announced."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", path)
    for name, value in {**headers, "content-length": str(size)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.slow
def test_every_route_but_health_needs_a_key(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        routes = ["/", "/ready", "/metrics", "/events", "/v1/models", "/v1/models/small", "/nowhere", "/health/"]
        assert {client.get(path).status_code for path in routes} == {401}
        assert client.post(CHAT, json=HI).json()["error"]["message"].startswith("Send a key of this gateway.")
        for wrong in ("Bearer", "Bearer x", f"Bearer {ANN}x", f"Bearer {ANN[:-1]}", f"Basic {ANN}", ANN, "Bearer ä"):
            refused = client.get("/v1/models", headers=[(b"authorization", wrong.encode())])
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key"), wrong
        assert refused.json()["error"]["message"].startswith("This is not a key of this gateway.")
        assert client.get(f"/v1/models?key={ANN}").status_code == 401

        ann = {"authorization": f"Bearer {ANN}"}
        answer = client.post(CHAT, json=HI, headers={**ann, "x-biollm-tags": "user=bob,run=7"})
        assert answer.json()["choices"][0]["message"]["content"] == "hello"
        assert client.get("/ready", headers=ann).json() == {"ready": True, "first": "first/small"}

        for host, status in (
            ("evil.example", 421),
            ("127.0.0.1.evil.example", 421),
            ("localhost:1", 200),
            ("[::1]", 200),
            ("[::1]:1", 200),
            ("", 421),
            ("localhost:80/health?", 421),  # an old Starlette read the path out of it (CVE-2026-48710)
            ("localhost/health?", 421),
            ("localhost:80#", 421),
            ("localhost:", 421),
            ("localhost:x", 421),
            ("ann@localhost", 421),
            ("[::1]/health?", 421),
            ("[::1%/health?]", 421),
            ("[localhost]", 421),
        ):
            health = client.get("/health", headers={"host": host}).status_code
            assert health == (status if host else 200), "balancers look without a name"
            assert client.get("/v1/models", headers={**ann, "host": host}).status_code == status, host
            assert client.post(CHAT, json=HI, headers={"host": host}).status_code == max(status, 401), host
        assert announced(url, CHAT, auth.MAX_BODY + 1, ann) == 413
        assert client.post(CHAT, headers=ann, content=iter([b"{}"])).status_code == 411

        bob = {"authorization": f"Bearer {BOB}"}
        assert [client.post(CHAT, json=HI, headers=bob).status_code for _ in range(2)] == [200, 429]
        limited = client.post(CHAT, json=HI, headers=bob)
        assert "This key is at its limit: 1/day used by gateway/bob" in limited.json()["error"]["message"]
        assert 0 < int(limited.headers["retry-after"]) <= 86400
        assert client.get("/v1/models", headers=bob).status_code == 200
    until(lambda: len(list(ledger().history())) == 2)  # the gateway writes them after it has answered
    tags = [record.tags for record in ledger().history()]
    assert tags == [{"key": "ann", "user": "ann", "run": "7"}, {"key": "bob"}]


@pytest.mark.slow
def test_a_browser_sees_the_pages_by_http_basic_and_no_more(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        asked = client.get("/")
        assert (asked.status_code, asked.headers["www-authenticate"].split()[0]) == (401, "Basic")
        assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"
        cancelled = client.get("/", headers={"accept": "text/html,*/*"})
        assert (cancelled.status_code, cancelled.headers["www-authenticate"]) == (
            401,
            asked.headers["www-authenticate"],
        )
        assert cancelled.headers["content-type"].startswith("text/html")
        assert "`biollm serve status` shows where" in cancelled.text
        for user, password in (("", ""), ("ann", ""), ("ann", ANN[:-1]), (ANN, "x"), ("ann", f"{ANN}:")):
            assert client.get("/", auth=(user, password)).status_code == 401, (user, password)
        for broken in ("Basic", "Basic x", "Basic ä", f"Basic {ANN}", "Basic gICA"):
            assert client.get("/", headers=[(b"authorization", broken.encode())]).status_code == 401, broken
    with httpx.Client(base_url=url, timeout=60, auth=("anything", ANN)) as client:
        assert "<html" in client.get("/").text
        with client.stream("GET", "/events") as events:
            assert events.status_code == 200
        assert client.get("/metrics").status_code == 200
        others = [client.post(CHAT, json=HI), client.get("/v1/models"), client.get("/ready"), client.post("/")]
        assert {answer.status_code for answer in others} == {401}
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
            for path in ("/", "/metrics"):
                assert client.get(path, headers={"sec-fetch-site": site}).status_code == status, site


def test_a_random_key_is_made_once_in_a_private_file(state: Path) -> None:
    (key,), where = keys.keys()
    file = state / "gateway.key"
    assert where == str(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().strip() == key.secret
    assert len(key.secret) >= 43
    assert key.secret not in repr(key)
    assert keys.keys()[0] == (key,)
    file.chmod(0o644)  # others may have read it
    assert keys.keys()[0] != (key,)


MODELS = ("GET", "/v1/models")
EMPTY: list[tuple[tuple[str, str], dict[str, Any]]] = [  # requests that name no key
    (MODELS, {}),
    (MODELS, {"headers": {"authorization": ""}}),
    (MODELS, {"headers": {"authorization": "Bearer"}}),
    (("GET", "/"), {}),
    (("GET", "/"), {"auth": ("ann", "")}),
]


@pytest.mark.parametrize("kept", [b"", b"\n", b"short-secret", b"\xff" * 43, b"two words, and more than 16"])
def test_a_file_without_a_whole_key_gets_a_new_one_with_one_warning(
    state: Path, caplog: pytest.LogCaptureFixture, kept: bytes
) -> None:
    state.mkdir(mode=0o700)
    (state / "gateway.key").write_bytes(kept)
    (state / "gateway.key").chmod(0o600)
    with ThreadPoolExecutor(4) as pool:
        made = {found[0].secret for found, _ in pool.map(lambda _: keys.keys(), range(4))}
    assert (len(made), len((state / "gateway.key").read_text().strip())) == (1, 43)
    (warning,) = caplog.messages
    assert str(state / "gateway.key") in warning and "short-secret" not in warning


@pytest.mark.slow
def test_an_emptied_key_file_admits_nobody(
    net: Loopback, waterfall: Waterfall, state: Path, gateway: Callable[..., dict[str, Any]]
) -> None:
    waterfall(first=net.serve())
    state.mkdir(mode=0o700)
    (state / "gateway.key").touch(mode=0o600)
    url = gateway("--port", "0")["url"]
    assert {httpx.request(how[0], f"{url}{how[1]}", **more).status_code for how, more in EMPTY} == {401}
    key = (state / "gateway.key").read_text().strip()
    assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def ask(app: Any, *how: Any, **more: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(base_url="http://gateway", transport=transport) as client:
            return await client.request(*how, **more)

    return asyncio.run(asked())


def test_a_key_that_is_empty_is_equal_to_none() -> None:
    app = auth.Admission(PlainTextResponse("in"), [auth.Key("empty", "")], "gateway")
    assert {ask(app, *how, **more).status_code for how, more in EMPTY} == {401}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the tags and the data policy that the routes see."""
    policy = Headers(scope=scope).get("x-biollm-policy")
    await JSONResponse({"tags": scope["biollm.tags"], "policy": policy})(scope, receive, send)


@pytest.fixture
def guarded() -> auth.Admission:
    known = [auth.Key("ann", ANN, {"user": "ann"}), auth.Key("bob", BOB, start_local=True)]
    return auth.Admission(echo, known, "gateway")


def codex(secret: str = BOB, policy: str = "any", seconds: float = 60) -> str:
    return derive(secret, Grant("codex", policy, int(time.time() + seconds)))


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_derived_key_tags_its_agent(guarded: auth.Admission, header: str) -> None:
    given = f"Bearer {codex()}" if header == "authorization" else codex()
    assert ask(guarded, *MODELS, headers={header: given}).json()["tags"] == {"key": "bob", "agent": "codex"}


def test_a_key_may_be_given_as_anthropics_client_gives_it(guarded: auth.Admission) -> None:
    assert ask(guarded, *MODELS, headers={"x-api-key": ANN}).json()["tags"] == {"key": "ann", "user": "ann"}
    assert {ask(guarded, *MODELS, headers={"x-api-key": key}).status_code for key in ("", f"{ANN}x")} == {401}
    assert ask(guarded, "GET", "/", headers={"x-api-key": ANN}).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        codex(ANN[:-1]),
        codex().replace("codex", "claude"),
        codex(policy="local_only").replace("local_only", "any"),
        codex()[:-1],
        codex().rpartition(".")[0],
        codex() + "ä",
        "biollm-agent.",
        ".",
    ],
    ids=["secret", "agent", "policy", "cut", "unsigned", "letter", "empty", "dot"],  # the keys hold the time
)
def test_a_derived_key_that_was_changed_opens_nothing(guarded: auth.Admission, wrong: str) -> None:
    refused = ask(guarded, *MODELS, headers=[(b"authorization", f"Bearer {wrong}".encode())])
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_an_expired_key_names_the_command_that_makes_a_new_one(guarded: auth.Admission) -> None:
    refused = ask(guarded, *MODELS, headers={"x-api-key": codex(seconds=-1)})
    message = "This key has expired. Start the agent again: biollm run codex."
    assert (refused.status_code, refused.json()["error"]["message"]) == (401, message)


@pytest.mark.parametrize(
    ("of_key", "sent", "seen"),
    [
        ("any", None, None),
        ("any", "no_training", "no_training"),
        ("no_training", None, "no_training"),
        ("no_training", "any", "no_training"),
        ("no_training", "local_only", "local_only"),
        ("local_only", "no_training", "local_only"),
        ("local_only", "nonsense", "nonsense"),  # refused later
    ],
)
def test_a_request_cannot_loosen_the_policy_of_its_key(
    guarded: auth.Admission, of_key: str, sent: str | None, seen: str | None
) -> None:
    headers = {"x-api-key": codex(policy=of_key)} | ({"x-biollm-policy": sent} if sent else {})
    assert ask(guarded, *MODELS, headers=headers).json()["policy"] == seen


@pytest.mark.slow
@pytest.mark.parametrize("short", ["x", "fifteen-letters", " " * 20])
def test_a_variable_that_is_too_short_is_a_configuration_error(
    waterfall: Waterfall, monkeypatch: pytest.MonkeyPatch, runtime: Path, biollm: Callable[..., Any], short: str
) -> None:
    waterfall(first="http://localhost:1/v1")
    monkeypatch.setenv("BIOLLM_GATEWAY_KEY", short)
    ran = biollm("serve", "--port", "0", "--idle-timeout", "1")
    assert (ran.code, ran.out) == (78, "")
    assert "biollm: BIOLLM_GATEWAY_KEY: has fewer than 16 characters" in ran.err and "fifteen-letters" not in ran.err
    assert biollm("serve", "--port", "0", "--detach").code == 78


def test_the_variable_holds_a_key_too(waterfall: Waterfall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOLLM_GATEWAY_KEY", "from-the-environment")
    found, where = keys.keys()
    assert ([key.secret for key in found], where) == (["from-the-environment"], "BIOLLM_GATEWAY_KEY")
    file = waterfall() / "gateway_keys.yaml"
    file.write_text(KEYS)
    file.chmod(0o600)
    found, where = keys.keys()
    assert ([key.name for key in found], where) == (["ann", "bob", "environment"], str(file))
    assert str(found[1].limits[0]) == "1/day"


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        (KEYS, 0o640, "holds keys and can be read by others. chmod 600"),
        ("ann: {key: short-secret}\n", 0o600, "gateway_keys.yaml:1: ann.key: must have at least 16 characters."),
        (f"ann: {{key: {ANN}, limit: 1/day}}\n", 0o600, "ann.limit: is not a known key. Did you mean rate_limit?"),
        (
            f"ann: {{key: {ANN}, colour: red}}\n",
            0o600,
            "is not a known key. Known: key, tags, rate_limit, token_limit, token_budget, budget, resets, start_local, pages.",
        ),
        (f"ann: {{key: {ANN}, rate_limit: fast}}\n", 0o600, "ann.rate_limit: 'fast' is not a"),
        ("ann: {tags: {a: b}}\n", 0o600, "ann.key: is missing."),
        (f"ann: {{key: {ANN}, start_local: perhaps}}\n", 0o600, "ann.start_local: must be true or false."),
        (f"ann: {ANN}\n", 0o600, "gateway_keys.yaml:1: ann: must be a mapping."),
        ("ann: [\n", 0o600, "gateway_keys.yaml:"),
        ("{}\n", 0o600, "holds no key. Write NAME: {key: ...}."),
    ],
)
def test_a_wrong_file_of_keys_is_told_without_them(waterfall: Waterfall, text: str, mode: int, told: str) -> None:
    file = waterfall() / "gateway_keys.yaml"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(ConfigError) as error:
        keys.keys()
    assert told in str(error.value)
    assert ANN not in str(error.value) and "short-secret" not in str(error.value)


@pytest.mark.parametrize(("names", "status"), [((), 421), (("LLM.lab.example",), 200)])
def test_a_balancers_name_is_served_where_it_was_given(names: tuple[str, ...], status: int) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("fine")(scope, receive, send)

    admission = auth.Admission(inner, [auth.Key("ann", ANN)], "10.0.0.11", names=names)

    async def ask() -> int:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(admission), base_url="http://llm.lab.example"
        ) as client:
            return (await client.get("/v1/models", headers={"authorization": f"Bearer {ANN}"})).status_code

    assert asyncio.run(ask()) == status
