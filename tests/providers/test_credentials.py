"""Whose key is found where, and that nobody sees it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from biollm._files import write_private
from biollm.config import Account, Provider
from biollm.providers import credentials
from biollm.providers.credentials import Credential
from biollm.providers.gateway_key import Grant, derive

SECRET = "sk-planted-0123456789"


def find(state: Path, account: Account | None = None, **provider: object) -> Credential | str:
    entry = Provider.model_validate({"name": "somebody", "type": "api", "litellm_provider": "openai", **provider})
    return credentials.find(entry, account or entry.accounts[0], state)


def key_file(folder: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    path = folder / "the key"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("value", ["", "   ", "\n"])
def test_an_empty_variable_is_a_missing_one(state: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SOME_KEY", value)
    assert find(state, env_key="SOME_KEY") == "no key: set SOME_KEY"


def test_a_variable_is_read_at_each_call(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(state, env_key="SOME_KEY") == "no key: set SOME_KEY"
    monkeypatch.setenv("SOME_KEY", f" {SECRET}\n")
    found = find(state, env_key="SOME_KEY")
    assert isinstance(found, Credential)
    assert found.secret == SECRET


@pytest.mark.parametrize("other", ["OPENAI_API_KEY", "SOMEBODY_API_KEY", "LITELLM_API_KEY"])
def test_another_variable_never_stands_in(state: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setenv(other, SECRET)
    assert find(state, env_key="SOME_KEY") == "no key: set SOME_KEY"
    assert find(state) == "no key: give somebody an env_key or a key_file in providers.yaml"


@pytest.mark.parametrize("type_", ["local", "embedded"])
def test_what_runs_here_needs_no_key(state: Path, type_: str) -> None:
    assert find(state, type=type_) == Credential()


def test_what_runs_here_needs_the_key_it_names(state: Path) -> None:
    assert find(state, type="local", env_key="SOME_KEY") == "no key: set SOME_KEY"


def test_each_account_has_its_own(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_A", "aaa")
    monkeypatch.setenv("KEY_B", "bbb")
    a = find(state, Account(name="a", env_key="KEY_A"))
    b = find(state, Account(name="b", env_key="KEY_B"))
    assert isinstance(a, Credential)
    assert isinstance(b, Credential)
    assert (a.secret, b.secret) == ("aaa", "bbb")
    assert a.fingerprint != b.fingerprint


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_file_is_read_again_at_each_call(state: Path, tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, f"{SECRET}\n", mode)
    old = find(state, key_file=path)
    path.chmod(0o600)
    new = find(state, key_file=key_file(tmp_path, "another"))
    assert isinstance(old, Credential)
    assert isinstance(new, Credential)
    assert (old.secret, new.secret) == (SECRET, "another")
    assert old.fingerprint != new.fingerprint


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604, 0o666])
def test_a_key_file_that_others_may_open_is_refused_with_the_mend(state: Path, tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, mode=mode)
    assert find(state, key_file=path) == f"the key file {path} is open to others: chmod 600 '{path}'"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold one key and nothing else"),
        ("\n\n", "must hold one key and nothing else"),
        (f"{SECRET}\n{SECRET}\n", "must hold one key and nothing else"),
        (f"KEY = {SECRET}", "must hold one key and nothing else"),
        (f"{SECRET}…", "must hold one key and nothing else"),
    ],
)
def test_a_key_file_holds_one_key(state: Path, tmp_path: Path, text: str, says: str) -> None:
    found = find(state, key_file=key_file(tmp_path, text))
    assert isinstance(found, str)
    assert says in found
    assert SECRET not in found


def test_a_missing_key_file_says_which(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    assert find(state, key_file=path) == f"the key file {path} cannot be read: No such file or directory"


def test_a_binary_key_file_is_a_sentence(state: Path, tmp_path: Path) -> None:
    path = key_file(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    assert find(state, key_file=path) == f"the key file {path} cannot be read: it is not text"


def test_the_variable_comes_before_the_file(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(env_key="SOME_KEY", key_file=key_file(tmp_path, "from-the-file"))
    from_file = find(state, account)
    monkeypatch.setenv("SOME_KEY", "from-the-variable")
    from_variable = find(state, account)
    assert isinstance(from_file, Credential)
    assert isinstance(from_variable, Credential)
    assert (from_file.secret, from_variable.secret) == ("from-the-file", "from-the-variable")


def test_a_copilot_account_that_is_not_logged_in_says_how(state: Path) -> None:
    found = find(state, Account(name="lab"), litellm_provider="github_copilot")
    assert found == "not logged in: biollm login github_copilot --account lab"


def test_the_secret_shows_nowhere(state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = find(state, key_file=key_file(tmp_path))
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("biollm").debug("%s %r", found, found)
    assert isinstance(found, Credential)
    assert found.fingerprint in caplog.text
    assert all(SECRET[start : start + 8] not in caplog.text for start in range(len(SECRET) - 8))


def test_fingerprints_are_the_same_in_every_process_and_tell_keys_apart() -> None:
    assert Credential(SECRET).fingerprint == "b6057e5e86ac"
    assert Credential(SECRET + "0").fingerprint != Credential(SECRET).fingerprint
    assert Credential("").fingerprint == ""


@pytest.mark.parametrize("kept", ["gateway.key", "gateway_keys.yaml", "BIOLLM_GATEWAY_KEY", "derived"])
def test_a_key_of_the_own_gateway_is_no_providers_key(
    state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: str
) -> None:
    key = derive(SECRET, Grant("codex", "any", 0)) if kept == "derived" else SECRET
    monkeypatch.setenv("SOME_KEY", key)
    if kept == "gateway.key":
        write_private(state / kept, f"{SECRET}\n")
    elif kept == "gateway_keys.yaml":
        write_private(tmp_path / "site" / kept, f"ann: {{key: {SECRET}}}\n")
    elif kept != "derived":
        monkeypatch.setenv(kept, SECRET)
    assert find(state, env_key="SOME_KEY") == (
        "SOME_KEY holds a key of biollm's own gateway, which cannot be its own provider: "
        "set it to a key of somebody, or unset it"
    )
