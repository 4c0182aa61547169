"""Each check of `biollm doctor`, good and bad, with its fix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from provider import Loopback

from biollm.config import load_config
from biollm.monitoring.doctor import Check, check

Waterfall = Callable[..., Path]


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing of Slurm on it; returns the folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def found(name: str) -> Check:
    return next(each for each in check(load_config()) if each.name == name)


def command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_keys(waterfall: Waterfall, monkeypatch: pytest.MonkeyPatch) -> None:
    waterfall(first="https://a.example/v1", second="https://b.example/v1")
    assert (found("keys").ok, found("keys").detail) == (True, "found for first, second; 0 missing")
    monkeypatch.delenv("SECOND_KEY")
    assert (found("keys").ok, found("keys").detail) == (True, "found for first; 1 missing")
    monkeypatch.delenv("FIRST_KEY")
    assert not found("keys").ok
    assert "FIRST_KEY" in found("keys").fix
    monkeypatch.setenv("FIRST_KEY", "biollm-agent.codex.any.1.0")
    monkeypatch.setenv("SECOND_KEY", "a-key-of-its-own")
    assert not found("keys").ok
    assert found("keys").fix.endswith(
        "providers.first.env_key: FIRST_KEY holds a key of biollm's own gateway, which cannot be its own provider. "
        "Set the provider's own key."
    )


def test_a_proxy_that_does_not_answer(waterfall: Waterfall, net: object, monkeypatch: pytest.MonkeyPatch) -> None:
    waterfall()
    assert found("proxy").ok
    monkeypatch.setenv("https_proxy", net.refusing().removesuffix("/v1"))  # type: ignore[attr-defined]
    assert not found("proxy").ok
    assert found("proxy").fix == "Correct or unset https_proxy."


@pytest.mark.parametrize(
    ("written", "answers"),
    [
        ("http://{up}", True),
        ("{up}", True),
        ("http://user:secret@{up}", True),
        ("{down}", False),
        ("http://{up}0", False),
    ],
)
def test_a_proxy_is_understood_as_httpx_understands_it(
    waterfall: Waterfall, net: Loopback, monkeypatch: pytest.MonkeyPatch, written: str, answers: bool
) -> None:
    waterfall()
    up, down = (urlsplit(url).netloc for url in (net.serve().url, net.refusing()))
    monkeypatch.setenv("https_proxy", written.format(up=up, down=down))
    said = f"https_proxy is set, {'and 127.0.0.1 answers' if answers else 'but 127.0.0.1 does not answer'}"
    assert (found("proxy").ok, found("proxy").detail) == (answers, said)


def test_weights(waterfall: Waterfall, tmp_path: Path) -> None:
    waterfall({"models": {"qwen": {"type": "local", "path": str(tmp_path / "weights"), "gpus_required": 1}}})
    assert not found("weights").ok
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").touch()
    (tmp_path / "weights" / "model.safetensors").touch()
    assert found("weights").ok
    assert "qwen" in found("weights").detail


def site(folder: Path, text: str) -> None:
    (folder / "cluster.yaml").write_text(f"cluster:\n  {text}\n")


def test_the_serving_environment(waterfall: Waterfall, tmp_path: Path, bare: Path) -> None:
    folder = waterfall()
    site(folder, f"environment: {{venv: {tmp_path}/venv}}")
    assert "pip install 'vllm==0.32.*'" in found("serving environment").fix
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    command(tmp_path / "venv" / "bin", "vllm", "exit 0")
    assert (found("serving environment").ok, found("serving environment").detail) == (
        True,
        f"vLLM comes from {tmp_path}/venv",
    )


@pytest.mark.parametrize("where", ["venv", "conda", "PATH"])
@pytest.mark.parametrize(("version", "ok"), [("0.32.1", True), ("0.29.0", False)])
def test_the_version_of_vllm_is_compared_with_its_flags(
    waterfall: Waterfall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, version: str, ok: bool
) -> None:
    folder, prefix = waterfall(), tmp_path / "env"
    facts = prefix / "lib" / "python3.12" / "site-packages" / f"vllm-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (prefix / "bin").mkdir()
    command(prefix / "bin", "vllm", "exit 1")
    if where == "PATH":
        monkeypatch.setenv("PATH", str(prefix / "bin"))
    site(folder, f"environment: {{{'venv: null' if where == 'PATH' else f'{where}: {prefix}'}}}")
    check = found("serving environment")
    assert (check.ok, check.detail.startswith(f"vLLM {version} comes from {prefix}")) == (ok, True)
    assert check.fix == ("" if ok else f"{prefix}/bin/pip install 'vllm==0.32.*'")


def test_a_machine_without_slurm_is_told_where_to_run_and_is_asked_nothing_more(waterfall: Waterfall) -> None:
    site(waterfall(), "partition: gpu")
    last = check(load_config())[-1]
    assert (last.name, last.ok) == ("slurm", False)
    assert "login node" in last.fix


def test_a_laptop_is_not_checked_for_what_it_does_not_want(waterfall: Waterfall) -> None:
    waterfall()
    *_, last = check(load_config())
    assert (last.name, last.ok) == ("cluster", True)
    assert {each.name for each in check(load_config())} == {"state folder", "keys", "proxy", "cluster"}


def test_a_submission_that_slurm_would_refuse(waterfall: Waterfall, bare: Path, tmp_path: Path) -> None:
    folder = waterfall()
    for name in ("squeue", "scontrol", "scancel"):
        command(bare, name, "exit 0")
    refusal = "sbatch: error: Batch job submission failed: Invalid partition name specified"
    command(bare, "sbatch", f'/bin/cp "$2" {tmp_path}/asked; echo "{refusal}" >&2; exit 1')
    site(folder, "partition: nowhere")
    assert "no such partition" in found("submission").detail
    assert "sinfo" in found("submission").fix
    assert "#SBATCH --partition=nowhere" in (tmp_path / "asked").read_text()
    command(bare, "sbatch", "exit 0")
    assert found("submission").ok


def test_a_run_directory_that_only_this_host_sees(waterfall: Waterfall, bare: Path, tmp_path: Path) -> None:
    folder = waterfall()
    command(bare, "scontrol", "echo 'NodeName=n1 NodeAddr=10.0.0.1'")
    site(folder, f"run_dir: {tmp_path}/run")
    assert not found("run directory").ok
    assert "shared folder" in found("run directory").fix
    command(bare, "scontrol", f"echo 'NodeName=n1 NodeAddr={os.uname().nodename}'")
    assert found("run directory").ok


@pytest.mark.parametrize(
    ("folder", "detail"),
    [
        ("relative", "relative is a relative path: each working directory has its own"),
        ("/etc/passwd/state", "/etc/passwd/state cannot be used: /etc/passwd is not a folder"),
    ],
)
def test_a_state_folder_that_cannot_be_used_is_reported(
    monkeypatch: pytest.MonkeyPatch, folder: str, detail: str
) -> None:
    monkeypatch.setenv("BIOLLM_STATE_DIR", folder)
    assert (found("state folder").ok, found("state folder").detail) == (False, detail)
