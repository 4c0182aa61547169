"""State and run folders on a real network file system: sshfs, once per host, which passes no locks between hosts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import debian
import pytest
from conftest import until
from provider import Loopback, Server

from biollm._files import locked
from biollm.cli.app import _run  # noqa: F401 # imported while the state folder answers
from biollm.client import Client, get_model_client
from biollm.config import Cluster
from biollm.ledger.sqlite import databases, locks_are_local, on_network
from biollm.slurm.endpoints import STALE_S, Records

pytestmark = pytest.mark.real
SFTP = Path("/usr/lib/openssh/sftp-server")
Write = Callable[..., Path]


@dataclass
class Share:
    """A folder, mounted by each of its hosts. `hang` stops the server of one."""

    root: Path
    servers: dict[str, Path] = field(default_factory=dict[str, Path])

    @property
    def source(self) -> Path:
        return self.root / "source"

    def mount(self, host: str, *options: str) -> Path:
        """Mount it for a host, by an sftp server without ssh before it."""
        point, server = self.root / host, self.root / f"{host}.sh"
        point.mkdir()
        self.source.mkdir(exist_ok=True)
        server.write_text(f"#!/bin/sh\necho $$ >{server}.pid\nexec {SFTP}\n")
        server.chmod(0o755)
        command = ["sshfs", "-o", ",".join([f"ssh_command={server}", *options]), f"x:{self.source}", point]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"sshfs cannot mount here: {done.stderr}")
        self.servers[host] = Path(f"{server}.pid")
        return point

    def signal(self, host: str, which: signal.Signals) -> None:
        os.kill(int(self.servers[host].read_text()), which)


@pytest.fixture(scope="session")
def sshfs() -> None:
    if not (shutil.which("sshfs") and SFTP.exists()):
        with suppress(subprocess.CalledProcessError):
            debian.install("sshfs", "openssh-sftp-server")
    if not (shutil.which("sshfs") and SFTP.exists() and Path("/dev/fuse").exists()):
        if os.environ.get("BIOLLM_REQUIRE_REAL") == "1":
            pytest.fail("required, but missing: sshfs, openssh-sftp-server or /dev/fuse")
        pytest.skip("no sshfs here")


@pytest.fixture
def share(sshfs: None, tmp_path: Path) -> Iterator[Share]:
    share = Share(tmp_path / "share")
    share.root.mkdir()
    try:
        yield share
    finally:
        for host in share.servers:
            with suppress(OSError, ValueError):
                share.signal(host, signal.SIGCONT)
            subprocess.run(["umount", "--lazy", share.root / host], check=False)


PROGRAM = """
import asyncio, sys
from pathlib import Path
from biollm.config import Limit
from biollm.ledger import Claim, Ledger
async def main():
    claim, got = Claim("p/a", (Limit("requests", 20, "hour"),)), 0
    for _ in range(15):
        got += isinstance(await ledger.reserve(claim), int)
        await asyncio.sleep(0.02)
    print(got)
ledger = Ledger(Path(sys.argv[1]))
asyncio.run(main())
ledger.close()
"""


def reserve(folder: Path, host: str) -> subprocess.Popen[str]:
    """Let a process on a host of this name reserve 15 requests."""
    command = ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh", sys.executable, "-c", PROGRAM]
    return subprocess.Popen([*command, str(folder)], stdout=-1, stderr=-1, text=True)


def finish(processes: list[subprocess.Popen[str]]) -> tuple[int, str]:
    """Return how many requests they got, and what they warned of."""
    found = [process.communicate(timeout=120) for process in processes]
    return sum(int(out) for out, _ in found), "".join(err for _, err in found)


def test_its_kind_is_known(share: Share) -> None:
    mounted = share.mount("login1")
    assert (on_network(mounted), locks_are_local(mounted)) == (True, True)
    assert databases(mounted) == mounted / "hosts" / os.uname().nodename


def test_limits_are_exact_on_each_host_and_no_file_is_damaged(share: Share) -> None:
    mounts = {host: share.mount(host) for host in ("login1", "login2")}
    for state in "abc":
        running = {host: [reserve(mounts[host] / state, host) for _ in range(2)] for host in mounts}
        found = {host: finish(processes) for host, processes in running.items()}
        assert not list(share.source.rglob("*corrupt*"))
        assert sorted(path.name for path in (share.source / state / "hosts").iterdir()) == ["login1", "login2"]
        if not any("within 250 ms" in err for _, err in found.values()):  # else the machine was too busy: once more
            break
    assert found == {"login1": (20, ""), "login2": (20, "")}


# --- a client whose state lies there ---------------------------------------------------------------------------------


@pytest.fixture
def asking(net: Loopback, waterfall: Write, share: Share, monkeypatch: pytest.MonkeyPatch) -> tuple[Client, Server]:
    server = net.serve(text="fine")
    waterfall(first=server)
    monkeypatch.setenv("BIOLLM_STATE_DIR", str(share.mount("login1") / "state"))
    client = get_model_client(sender="direct")
    assert client.complete("hi").text == "fine"
    return client, server


def test_a_hang_of_30_s_holds_up_no_answer(
    asking: tuple[Client, Server], share: Share, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = asking
    share.signal("login1", signal.SIGSTOP)
    resume = threading.Timer(30, share.signal, ("login1", signal.SIGCONT))
    resume.start()
    try:
        began = time.monotonic()
        took: list[float] = []
        while time.monotonic() < began + 25:
            start = time.monotonic()
            assert client.complete("hi").text == "fine"
            took.append(time.monotonic() - start)
            time.sleep(1)
        assert max(took) < 5, took
        assert len([each for each in caplog.records if "cannot be used" in each.message]) == 1
    finally:
        resume.join()
    until(lambda: rows(share, "login1") >= len(server.completions), 40)
    assert len(server.completions) == len(took) + 1, "nothing was sent twice"


def rows(share: Share, host: str) -> int:
    """Return the attempts in the history, as another host sees it."""
    import sqlite3

    file = next(share.source.rglob("history.db"), None)
    if file is None:
        return 0
    with suppress(sqlite3.Error), sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
        return int(db.execute("SELECT count(*) FROM attempt").fetchone()[0])
    return 0  # it is being written, and no lock says so here


def test_files_that_vanish_are_made_anew(asking: tuple[Client, Server], share: Share) -> None:
    client, server = asking
    client.__exit__()
    shutil.rmtree(share.source / "state")
    for _ in range(3):
        assert client.complete("hi").text == "fine"
        time.sleep(1)
    until(lambda: list(share.source.rglob("quotas.db")), 40)
    assert client.complete("hi").text == "fine"
    assert len(server.completions) == 5


def test_each_host_has_its_own_stored_answers(asking: tuple[Client, Server], share: Share) -> None:
    client, _ = asking
    client.complete("hi", cache=True)
    assert client.complete("hi", cache=True).cached
    (file,) = share.source.rglob("cache.db")
    assert file.relative_to(share.source).parts[:2] == ("state", "hosts"), "two hosts would damage a common file"


# --- records and locks -----------------------------------------------------------------------------------------------


def record(folder: Path) -> Path:
    """Write the record of a server on this host, as its supervisor does."""
    folder.mkdir(parents=True, exist_ok=True)
    start = "a" * 32
    facts = {
        "start": start, "cluster": "cluster", "job": "1", "submission": "s", "model": "m", "host": "here", "link": 1,
        "address": "127.0.0.1", "port": 1, "left_s": 3600,
    }  # fmt: skip
    (new := folder / "new").write_text(json.dumps(facts))
    new.chmod(0o600)
    return new.replace(folder / f"{start}.json")


@pytest.mark.slow
def test_a_server_that_is_renewed_stays_alive_where_attributes_are_stale(share: Share) -> None:
    node, login = share.mount("node"), share.mount("login")
    record(node / "run" / "biollm" / "records")
    records, stop = Records(Cluster(run_dir=login / "run")), threading.Event()

    def renew() -> None:
        while not stop.wait(5):
            record(node / "run" / "biollm" / "records")

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        for _ in range(int(STALE_S) + 6):
            alive, others = records.read()
            assert (len(alive), others) == (1, {})
            time.sleep(1)
    finally:
        stop.set()
        thread.join()


def test_locks_hold_between_the_processes_of_one_host(share: Share) -> None:
    lock = share.mount("login1") / "lock"
    program = "import sys; from pathlib import Path; from biollm._files import locked\n"
    program += "with locked(Path(sys.argv[1]), wait=False) as held: print(held)"
    with locked(lock) as held:
        other = subprocess.run([sys.executable, "-c", program, str(lock)], capture_output=True, text=True, check=True)
    assert (held, other.stdout.strip()) == (True, "False")


def test_doctor_says_what_limits_mean_there(share: Share, biollm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (state := share.mount("login1") / "state").mkdir()
    monkeypatch.setenv("BIOLLM_STATE_DIR", str(state))
    assert "passes no locks to other hosts, so limits hold for each host alone" in biollm("doctor").out
