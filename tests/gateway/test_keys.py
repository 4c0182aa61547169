"""Keys of the gateway with limits and budgets of their own: made, listed, counted and revoked."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from behaviours import Behaviour
from provider import Loopback
from starlette.testclient import TestClient

from biollm._runtime import ledger
from biollm.client import Client, get_model_client
from biollm.config import load_config
from biollm.gateway import app as gateway_app
from biollm.gateway import keys
from biollm.gateway.auth import Admission
from biollm.ledger import Ledger
from biollm.providers.gateway_key import Grant, derive, is_gateway_key

Waterfall = Callable[..., Path]
CHAT, HI = "/v1/chat/completions", {"model": "biollm", "messages": [{"role": "user", "content": "hi"}]}
SIXTY = Behaviour(usage={"prompt_tokens": 40, "completion_tokens": 20, "total_tokens": 60})
COSTS = {"costs": {"per_million_tokens": {"first": 1e6}}}  # a dollar a token


@pytest.fixture
def file(waterfall: Waterfall, net: Loopback) -> Path:
    return waterfall(COSTS, first=net.serve(then=SIXTY)) / "gateway_keys.yaml"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def gateway() -> TestClient:
    client = Client()
    return TestClient(Admission(gateway_app.app(client), keys.keys()[0], "testserver", client.config))


def ask(client: TestClient, key: str) -> int:
    status = client.post(CHAT, json=HI, headers=bearer(key)).status_code
    ledger(load_config()).flush()
    return status


@pytest.mark.parametrize("allowed", [False, True])
def test_a_key_for_another_opens_the_pages_only_where_it_may(biollm: Any, file: Path, allowed: bool) -> None:
    key = biollm("keys", "add", "ann", *(["--pages"] if allowed else [])).out.strip()
    client = gateway()
    for page in ("/", "/metrics"):
        assert client.get(page, headers=bearer(key)).status_code == (200 if allowed else 403)
    for path in ("/usage", "/v1/models"):
        assert client.get(path, headers=bearer(key)).status_code == 200


# --- The commands -----------------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_kept_as_its_hash(biollm: Any, file: Path) -> None:
    file.write_text("# ours\nold: {key: old-0123456789abcdef}  # by hand\n")
    file.chmod(0o600)
    made = biollm("keys", "add", "ann", "--rate-limit", "30/min", "--budget", "10 USD/month", "--tag", "user=ann")
    key = made.out.strip()
    assert (made.code, len(key)) == (0, 43)
    assert "only time" in made.err and key not in made.err
    assert key not in file.read_text()
    assert file.read_text().startswith("# ours\nold: {key: old-0123456789abcdef}  # by hand\n")
    assert oct(file.stat().st_mode)[-3:] == "600"
    ann = next(each for each in keys.keys()[0] if each.name == "ann")
    assert (ann.secret, dict(ann.tags), [str(each) for each in ann.limits]) == (
        "", {"user": "ann"}, ["30/min", "10 USD/month"]
    )  # fmt: skip
    assert is_gateway_key(key, file.parent), "a provider's variable must not hold it"
    listed = biollm("keys", "list", "--json").json
    assert [each["name"] for each in listed] == ["old", "ann"]
    assert listed[1]["limits"][1] == {
        "limit": "10 USD/month",
        "used": 0,
        "resets_at": listed[1]["limits"][1]["resets_at"],
    }
    assert "0 of 30/min, 0 of 10 USD/month" in biollm("keys", "list").out


def test_revoking_leaves_the_others_and_their_comments(biollm: Any, file: Path) -> None:
    text = "# head\nann:\n  key: ann-0123456789abcdef\n\n# about ben\nben: {key: ben-0123456789abcdef}\n"
    file.write_text(text)
    file.chmod(0o600)
    assert biollm("keys", "revoke", "ann").code == 0
    assert file.read_text() == "# head\n\n# about ben\nben: {key: ben-0123456789abcdef}\n"
    assert biollm("keys", "revoke", "ben").code == 0
    assert file.read_text() == "# head\n\n# about ben\n{}\n"
    assert biollm("keys", "list").err.strip().endswith("Make one: biollm keys add NAME")
    assert biollm("keys", "add", "cy").code == 0
    assert [each.name for each in keys.listed()] == ["cy"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("add ann", "has a key named 'ann' already."),
        ("add a/b", "'a/b' cannot be a key's name."),
        ("add random", "'random' is the name of a key of the gateway itself."),
        ("add ben --rate-limit fast", "--rate-limit: 'fast' is not a valid limit"),
        ("add ben --budget 10", "--budget: '10' is not a valid limit"),
        ("add ben --tag user", "--tag has 'user', which is not key=value."),
        ("revoke anne", "has no key named 'anne'.\nDid you mean ann?"),
    ],
)
def test_a_wrong_command_changes_nothing(biollm: Any, file: Path, command: str, message: str) -> None:
    text = "ann: {key: ann-0123456789abcdef}\n"
    file.write_text(text)
    file.chmod(0o600)
    done = biollm("keys", *command.split())
    assert done.code == 2
    assert message in done.err
    assert (done.out, file.read_text()) == ("", text)


@pytest.mark.parametrize("text", [b"[ann]\n", b"ann\n", b"ann: [\n", b"\xff\xfe\n", b"ann: &x {key: *y}\n"])
@pytest.mark.parametrize("command", ["add ben", "revoke ann", "list"])
def test_a_file_that_holds_no_keys_is_left_as_it_is(biollm: Any, file: Path, text: bytes, command: str) -> None:
    file.write_bytes(text)
    file.chmod(0o600)
    done = biollm("keys", *command.split())
    assert (done.code, done.out, file.read_bytes()) == (78, "", text)
    assert re.match(f"biollm: {re.escape(str(file))}:[12]: ", done.err) and "elete" not in done.err


def test_an_empty_file_takes_a_key(biollm: Any, file: Path) -> None:
    file.write_text("")
    file.chmod(0o600)
    assert biollm("keys", "add", "ann").code == 0
    assert [each.name for each in keys.listed()] == ["ann"]


@pytest.mark.parametrize("command", ["add ben", "revoke ann"])
def test_a_file_in_one_line_is_left_to_its_owner(biollm: Any, file: Path, command: str) -> None:
    text = "{ann: {key: ann-0123456789abcdef}, cy: {key: cyy-0123456789abcdef}}\n"
    file.write_text(text)
    file.chmod(0o600)
    done = biollm("keys", *command.split())
    assert done.code == 2
    assert "is not written with each key on lines of its own: change it by hand." in done.err
    assert file.read_text() == text


# --- What a key may use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--rate-limit", "2/day"], "2/day used by gateway/ann"),
        (["--token-limit", "100/min"], "100 tokens/min used by key/ann"),
        (["--token-budget", "120/month"], "120 tokens/month used by key/ann"),
        (["--budget", "100 USD/month"], "100 USD/month used by key/ann"),
        (["--rate-limit", "9/day", "--budget", "100 USD/month"], "100 USD/month used by key/ann"),
    ],
    ids=lambda each: each[1] if isinstance(each, list) else "",
)
def test_a_key_has_limits_of_its_own(biollm: Any, file: Path, options: list[str], reason: str) -> None:
    ann, ben = (biollm("keys", "add", name, *options).out.strip() for name in ("ann", "ben"))
    client = gateway()
    assert [ask(client, ann) for _ in range(3)] == [200, 200, 429]
    refused = client.post(CHAT, json=HI, headers=bearer(ann))
    assert f"This key is at its limit: {reason}" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0
    assert ask(client, ben) == 200


def test_a_refused_request_takes_nothing_of_the_keys_other_limits(biollm: Any, file: Path) -> None:
    ann = biollm("keys", "add", "ann", "--rate-limit", "9/day", "--token-budget", "60/month").out.strip()
    client = gateway()
    assert [ask(client, ann) for _ in range(4)] == [200, 429, 429, 429]
    used = {limit["limit"]: limit["used"] for limit in biollm("keys", "list", "--json").json[0]["limits"]}
    assert used == {"9/day": 1, "60 tokens/month": 60}


def test_a_stored_answer_uses_up_requests_but_no_tokens(biollm: Any, file: Path, state: Path) -> None:
    ann = biollm("keys", "add", "ann", "--rate-limit", "9/day", "--token-budget", "120/month").out.strip()
    client = gateway()
    for _ in range(4):
        assert client.post(CHAT, json={**HI, "biollm": {"cache": True}}, headers=bearer(ann)).status_code == 200

    def used() -> list[float]:
        ledger(load_config()).flush()
        return [limit["used"] for limit in biollm("keys", "list", "--json").json[0]["limits"]]

    assert used() == [4, 60]
    ledger(load_config()).close()
    for each in state.glob("quotas.db*"):
        each.unlink()
    assert ask(client, ann) == 200
    assert used() == [5, 120], "also as the history has it"


@pytest.mark.parametrize("ensemble", [3, ["small", "small", "small"], {"method": "vote"}, {"members": 3}])
def test_each_member_of_an_ensemble_counts(biollm: Any, waterfall: Waterfall, net: Loopback, ensemble: Any) -> None:
    server = net.serve()
    waterfall(first=server)
    ann = biollm("keys", "add", "ann", "--rate-limit", "5/day", "--budget", "100 USD/month").out.strip()
    client = gateway()

    def ask_all() -> httpx.Response:
        answer = client.post(CHAT, json={**HI, "biollm": {"ensemble": ensemble}}, headers=bearer(ann))
        ledger(load_config()).flush()
        return answer

    assert ask_all().status_code == 200
    sent = len(server.completions)
    refused = ask_all()
    assert (refused.status_code, len(server.completions)) == (429, sent)
    assert "5/day used by gateway/ann" in refused.json()["error"]["message"]
    limits = client.get("/usage", headers=bearer(ann)).json()["limits"]
    assert limits[0]["used"] == 3, "what was not sent does not count"
    assert [ask(client, ann) for _ in range(3)] == [200, 200, 429]


def test_an_ensemble_of_no_size_counts_once(biollm: Any, file: Path) -> None:
    ann = biollm("keys", "add", "ann", "--rate-limit", "5/day").out.strip()
    answer = gateway().post(CHAT, json={**HI, "biollm": {"ensemble": 1_000_000}}, headers=bearer(ann))
    assert (answer.status_code, "1 to 16 members" in answer.text) == (400, True)


def test_no_tag_stands_for_another_key(biollm: Any, file: Path) -> None:
    ben = biollm("keys", "add", "ben", "--tag", "key=ann").out.strip()
    client = gateway()
    assert ask(client, ben) == 200
    assert client.get("/usage", headers=bearer(ben)).json()["total"]["requests"] == 1


def test_a_lost_count_of_a_key_is_taken_from_the_history(biollm: Any, file: Path, state: Path) -> None:
    ann = biollm("keys", "add", "ann", "--rate-limit", "2/day", "--budget", "100 USD/month").out.strip()
    client = gateway()
    assert [ask(client, ann) for _ in range(2)] == [200, 200]
    ledger(load_config()).close()
    for name in ("quotas.db", "quotas.db-wal", "quotas.db-shm"):
        (state / name).unlink(missing_ok=True)
    again = Ledger(state)
    key = keys.listed()[0]
    import asyncio

    refused = [asyncio.run(again.reserve(claim)).reason for claim in (key.requests, key.usage)]  # type: ignore[union-attr]
    again.close()
    assert [each.split(",")[0] for each in refused] == ["2/day used by gateway/ann", "100 USD/month used by key/ann"]


def test_no_agents_key_can_be_derived_from_a_hash(biollm: Any, file: Path) -> None:
    ann = biollm("keys", "add", "ann").out.strip()
    client = gateway()
    written = json.dumps(file.read_text())
    grant = Grant("codex", "any", int(time.time() + 60))
    for secret in ("", ann, written.partition("sha256:")[2][:64], f"sha256:{written.partition('sha256:')[2][:64]}"):
        assert client.get("/v1/models", headers=bearer(derive(secret, grant))).status_code == 401
    assert client.get("/v1/models", headers=bearer(ann)).status_code == 200
    own = next(each.secret for each in keys.keys()[0] if each.secret)
    assert client.get("/v1/models", headers=bearer(derive(own, grant))).status_code == 200, "`biollm run` still has one"


# --- Usage ------------------------------------------------------------------------------------------------------------


def test_a_key_shows_its_own_usage_and_no_other(biollm: Any, file: Path) -> None:
    ann = biollm("keys", "add", "ann", "--budget", "100 USD/month").out.strip()
    ben = biollm("keys", "add", "ben").out.strip()
    client = gateway()
    assert [ask(client, key) for key in (ann, ben, ben)] == [200] * 3
    seen = client.get("/usage", headers=bearer(ann)).json()
    assert (seen["key"], seen["total"]["requests"], seen["total"]["prompt_tokens"]) == ("ann", 1, 40)
    assert [(each["name"], each["completion_tokens"]) for each in seen["models"]] == [("small", 20)]
    (limit,) = seen["limits"]
    assert (limit["limit"], limit["used"], limit["left"]) == ("100 USD/month", 60, 40)
    assert client.get("/usage", headers=bearer(ben)).json()["total"]["requests"] == 2
    assert seen["since"] < seen["until"] < limit["resets_at"] and seen["until"].endswith("+00:00")
    assert {each["used"] for key in biollm("keys", "list", "--json").json for each in key["limits"]} == {60}
    assert client.get("/usage?since=yesterday", headers=bearer(ben)).status_code == 400
    assert client.get("/usage?since=2099-01-01", headers=bearer(ben)).status_code == 400
    assert client.get("/usage").status_code == 401
    rows = {row["name"]: row["requests"] for row in biollm("usage", "--by", "key", "--json").json["rows"]}
    assert rows == {"ann": 1, "ben": 2}
    get_model_client().complete("hi")
    ledger().flush()
    assert "(none)" in biollm("usage", "--by", "key").out


def test_the_owners_socket_has_no_usage_of_a_key(file: Path) -> None:
    answer = TestClient(gateway_app.app(Client())).get("/usage")
    assert answer.status_code == 400
    assert "`biollm usage` shows" in answer.json()["error"]["message"]


# --- A running gateway ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_running_gateway_takes_and_refuses_keys_at_once(
    biollm: Any, file: Path, gateway: Callable[..., dict[str, Any]]
) -> None:
    url = gateway("--port", "0")["url"]

    def status(key: str) -> int:
        return httpx.get(f"{url}/v1/models", headers=bearer(key)).status_code

    ann, ben = (biollm("keys", "add", name).out.strip() for name in ("ann", "ben"))
    assert [status(ann), status(ben)] == [200, 200]
    biollm("keys", "revoke", "ann")
    assert [status(ann), status(ben)] == [401, 200]
    file.write_text(file.read_text() + "cy: {key: short}\n")
    assert status(ben) == 200, "a file with an error changes nothing"
    biollm("keys", "revoke", "cy")
    biollm("keys", "revoke", "ben")
    assert status(ben) == 401


@pytest.mark.real
def test_a_keys_limits_hold_over_gateways_on_several_hosts(
    biollm: Any, net: Loopback, waterfall: Waterfall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("redis")
    from redis_server import RedisServer, required

    required()
    server = RedisServer(tmp_path)
    try:
        waterfall({"ledger": {"url": server.server.url}, **COSTS}, first=net.serve(then=SIXTY))
        key = biollm("keys", "add", "ann", "--rate-limit", "3/day", "--token-budget", "1k/month").out.strip()
        statuses: list[int] = []
        for host in ("one", "other", "one", "other"):
            monkeypatch.setenv("BIOLLM_STATE_DIR", str(tmp_path / host))
            statuses.append(ask(gateway(), key))
        assert statuses == [200, 200, 200, 429]
        used = {limit["limit"]: limit["used"] for limit in biollm("keys", "list", "--json").json[0]["limits"]}
        assert used == {"3/day": 3, "1k tokens/month": 180}
    finally:
        server.stop()
