"""A state folder that a group shares (setgid): what its members share works for each, and secrets stay their owner's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_embedded import FILE, GGUF, HUB, model, serve

from biollm._files import write_private
from biollm.config import Cluster, Limit, load_config
from biollm.config.paths import own_dir, run_dir, state_dir
from biollm.gateway import keys
from biollm.ledger import Claim, Ledger, Record
from biollm.monitoring import alerts
from biollm.monitoring.doctor import check
from biollm.monitoring.snapshot import Collector
from biollm.providers import copilot, embedded

GROUP, ANN, BOB = 65500, 65501, 65502
root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as two other users")


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a state folder of the group's, and one home for each member."""
    folder = Path(tempfile.mkdtemp(prefix="biollm-lab-"))
    folder.chmod(0o755)
    for name, owner, mode in (("state", ANN, 0o2770), ("home-ann", ANN, 0o700), ("home-bob", BOB, 0o700)):
        (folder / name).mkdir()
        os.chown(folder / name, owner if os.getuid() == 0 else -1, GROUP if os.getuid() == 0 else -1)
        (folder / name).chmod(mode)
    (folder / "config").mkdir()
    rules = {"alerts": {"error_rate": 0.4, "at_least": 1}, "providers": {}, "inherit": False}
    (folder / "config" / "providers.yaml").write_text(json.dumps(rules))
    monkeypatch.setenv("BIOLLM_STATE_DIR", str(folder / "state"))
    monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(folder / "config"))
    monkeypatch.setenv("BIOLLM_SITE_CONFIG", str(folder / "none"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "none"))
    yield folder
    shutil.rmtree(folder)


def member(lab: Path, name: str, does: Callable[[], Any]) -> Any:
    """Return what a function gives in a process of that member of the group."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(reader)
            os.umask(0o077)
            os.setgroups([])
            os.setgid(GROUP)
            os.setuid(ANN if name == "ann" else BOB)
            os.environ["XDG_STATE_HOME"] = str(lab / f"home-{name}")
            os.write(writer, json.dumps(does()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read()
    assert os.waitpid(child, 0)[1] == 0, f"{name} could not"
    return json.loads(told)


def counted() -> list[float]:
    """Send a request under a limit; return how many have been sent, and who is resting."""
    limit, ledger = Limit("requests", 9, "day"), Ledger(state_dir())
    sent = asyncio.run(ledger.reserve(Claim("gemini/default", (limit,), ())))
    row = Record(time.time(), str(os.getuid()), "g/m", "g", "default", "m", "failed", "HTTP 500", ms=1.0, order=1)
    ledger.finish(sent if isinstance(sent, int) else None, "gemini/default", row)
    ledger.flush()
    used = ledger.used("gemini/default", [limit])[0][1]
    ledger.close()
    return [used]


def key() -> list[str]:
    (found,), where = keys.keys()
    return [found.secret, where]


def told() -> list[str]:
    config, said = load_config(), list[str]()
    ledger = Ledger(state_dir())
    alerts.check(config, ledger, Collector.of_process(config).snapshot(), state_dir(), said.append)
    ledger.close()
    return said


def log_in() -> str:
    before = copilot.token("lab", state_dir(), exchange=False)
    write_private(own_dir(state_dir()) / "github_copilot" / "lab" / "access-token", f"ghu-{os.getuid()}")
    return str(before)


@root_only
def test_limits_and_history_are_the_groups(lab: Path) -> None:
    assert [member(lab, name, counted) for name in ("ann", "bob", "ann")] == [[1], [2], [3]]


@root_only
def test_gateway_keys_are_each_members_own_and_stay(lab: Path) -> None:
    ann, bob, again = (member(lab, name, key) for name in ("ann", "bob", "ann"))
    assert ann == again and ann[0] != bob[0]
    assert [Path(each[1]).parents[1].name for each in (ann, bob)] == ["home-ann", "home-bob"]


@root_only
def test_alerts_are_told_to_each_member_once(lab: Path) -> None:
    load_config(), Collector.of_process(load_config()).snapshot()  # imports, which these members may not read
    member(lab, "ann", counted)
    assert [len(member(lab, name, told)) for name in ("ann", "bob", "ann", "bob")] == [1, 1, 0, 0]


@root_only
def test_logins_are_each_members_own(lab: Path) -> None:
    assert all("not logged in" in member(lab, name, log_in) for name in ("ann", "bob"))
    assert "not logged in" not in member(lab, "ann", log_in)
    assert not list((lab / "state").rglob("access-token"))


@root_only
def test_the_embedded_models_weights_are_fetched_once_for_all(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull() -> str:
        return str(embedded.pull(model(HUB), state_dir()))

    with serve() as host:
        monkeypatch.setenv("HF_ENDPOINT", host.url)
        monkeypatch.setenv("HF_TOKEN", "hf_planted")  # else it is sought in a home that members may not read
        host.files[FILE] = GGUF
        embedded.pull(model(HUB), lab / "other")  # imports
        host.seen.clear()
        path = Path(member(lab, "ann", pull))
        assert member(lab, "bob", pull) == str(path)
        assert member(lab, "bob", lambda: path.read_bytes() == GGUF)
        assert len(host.sent(FILE)) == 1
    assert path.parent.is_relative_to(lab / "state")


@root_only
def test_weights_that_only_their_owner_may_read_say_so(lab: Path) -> None:
    (lab / "state" / "weights").mkdir()
    path = embedded._weights(model(HUB), lab / "state").path
    path.write_bytes(GGUF)
    for folder_mode in (0o2770, 0o2700):
        (lab / "state" / "weights").chmod(folder_mode)
        path.chmod(0o600)
        why = member(lab, "bob", lambda: str(embedded.ready(model(HUB), state_dir())))
        assert ("cannot be read" in why and "chmod" in why) or "not installed" in why


@root_only
def test_the_default_run_directory_is_each_members_own(lab: Path) -> None:
    places = [member(lab, name, lambda: str(run_dir(Cluster()))) for name in ("ann", "bob")]
    assert places == [str(lab / f"home-{name}" / "biollm" / "slurm") for name in ("ann", "bob")]


def test_a_folder_of_ones_own_keeps_everything(tmp_path: Path) -> None:
    for mode in (0o700, 0o2700, 0o755, 0o770):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        assert own_dir(folder) == folder
    assert own_dir(tmp_path / "missing") == tmp_path / "missing"


def test_where_the_users_own_folder_is_the_shared_one_another_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "biollm").mkdir()
    (tmp_path / "biollm").chmod(0o2770)
    assert own_dir(tmp_path / "biollm") == tmp_path / "biollm-own"


@pytest.mark.parametrize(
    ("mode", "file_mode", "ok", "told"),
    [
        (0o700, 0o600, True, "is yours alone"),
        (0o2770, 0o660, True, "limits, cooldowns, usage and the embedded model's weights are shared"),
        (0o2770, 0o600, False, "quotas.db is closed to the group"),
        (0o770, 0o600, False, "has no setgid bit"),
    ],
)
def test_doctor_says_what_is_shared(lab: Path, mode: int, file_mode: int, ok: bool, told: str) -> None:
    (lab / "state").chmod(mode)
    (lab / "state" / "quotas.db").touch()
    (lab / "state" / "quotas.db").chmod(file_mode)
    found = next(each for each in check(load_config()) if each.name == "state folder")
    assert (found.ok, told in found.detail) == (ok, True), found
    assert found.ok or found.fix.startswith("chmod ")
    assert not ok or mode == 0o700 or "logins" in found.detail
