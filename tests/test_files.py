"""Whose a file is decides who may read it, and whether biollm may replace or remove it."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_memory import PUBLISHED

from biollm._files import locked, write_private, write_readable

Biollm = Callable[..., Any]
WRITES = {  # command -> the file that it writes for the user
    "models add org/Small --config {}/config.json": "config/models.yaml",
    "render-slurm qwen-coder-32b -o {}/job.sh": "job.sh",
    "top --html {}/now.html": "now.html",
    "init {}/new": "new/cluster.yaml",
}


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def run(waterfall: Callable[..., Path], tmp_path: Path, biollm: Biollm) -> Callable[[str], None]:
    waterfall(first="http://localhost:1/v1")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["llama-3.3-70b"]))

    def run(command: str) -> None:
        assert biollm(*command.format(tmp_path).split()).code == 0

    return run


# --- What biollm writes for the user is the user's ----------------------------------------------------------------


@pytest.mark.parametrize(("command", "file"), WRITES.items())
def test_a_new_file_gets_what_the_umask_says(
    umask: None, run: Callable[[str], None], tmp_path: Path, command: str, file: str
) -> None:
    run(command)
    assert mode(tmp_path / file) == "0o640"


@pytest.mark.parametrize(("command", "file"), [each for each in WRITES.items() if "init" not in each[0]])
def test_an_existing_file_keeps_its_mode_and_a_link_stays_one(
    run: Callable[[str], None], tmp_path: Path, command: str, file: str
) -> None:
    (tmp_path / "mine").write_text("models:\n  mine: {hf_id: me/mine}\n")
    (tmp_path / "mine").chmod(0o664)
    (tmp_path / file).symlink_to(tmp_path / "mine")
    run(command)
    assert (tmp_path / file).is_symlink()
    assert mode(tmp_path / "mine") == "0o664"
    assert len((tmp_path / "mine").read_text()) > 100


def test_a_device_is_written_to_and_not_replaced(run: Callable[[str], None], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    run("render-slurm qwen-coder-32b -o {}/pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.read(reader, 11) == b"#!/bin/bash"


# --- Private files are whole, whatever crashes --------------------------------------------------------------------


def test_a_private_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        synced.append((path.read_text() if path.is_file() else path.name, (tmp_path / "sub" / "key").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_private(tmp_path / "sub" / "key", "secret")
    assert synced == [("secret", False), ("sub", True)]
    assert mode(tmp_path / "sub" / "key") == "0o600"


def test_a_file_for_others_is_one_from_its_first_moment(
    umask: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a rename and a chmod, other users would see a file that they cannot read."""
    modes: list[str] = []
    rename = Path.replace

    def replace(path: Path, target: Path) -> Path:
        modes.append(mode(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_readable(tmp_path / "nodes.json", "{}")
    assert modes == [mode(tmp_path / "nodes.json")] == ["0o644"]


def test_a_full_disk_leaves_the_old_text_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_private(tmp_path / "key", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(tmp_path / "key", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("key", "old")]


# --- Locks --------------------------------------------------------------------------------------------------------


def test_a_forked_child_does_not_keep_a_lock_that_its_parent_has_released(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        if (child := os.fork()) == 0:
            signal.pause()
    try:
        with locked(tmp_path / "lock", wait=False) as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- What lies in the place of a file of ours is not ours ----------------------------------------------------------


def test_a_lock_is_not_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_private_file_takes_the_place_of_a_link_and_leaves_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "key").symlink_to(tmp_path / "mine")
    write_private(tmp_path / "key", "secret")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "key").read_text() == "secret"


def test_a_file_of_the_users_in_the_sockets_place_stays(
    waterfall: Callable[..., Path], runtime: Path, biollm: Biollm
) -> None:
    waterfall(first="http://localhost:1/v1")
    runtime.mkdir(mode=0o700)
    (runtime / "gateway.sock").write_text("mine")
    ran = biollm("serve", "--idle-timeout", "1")
    assert ran.code == 2 and "gateway.sock is not a socket" in ran.err
    assert (runtime / "gateway.sock").read_text() == "mine"
