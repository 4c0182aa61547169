"""Real parts on this machine: a Slurm of our own, vLLM built for CPU, SmolLM2's weights, LiteLLM's proxy, Chromium.

Where one is missing, its tests are skipped with a line that says what; BIOLLM_REQUIRE_REAL=1 makes that a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import debian
import programs
import pytest
from slurm_lab import LabMissingError, SlurmLab

from biollm import slurm
from biollm.config import Cluster, Environment, Model

T = TypeVar("T")
FAKE = Path(__file__).parent.parent / "fake_vllm.py"


def missing(what: str) -> NoReturn:
    """Skip, or fail where the real parts are required."""
    if os.environ.get("BIOLLM_REQUIRE_REAL") == "1":
        pytest.fail(f"required, but missing: {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """A cluster of three nodes with eight pretended GPUs each; SLURM_CONF and PATH point at it."""
    root = Path("/tmp") / f"biollm-lab-{os.getpid()}"  # munge's socket needs a short path
    lab = SlurmLab(root)
    old = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    try:
        with lab:
            os.environ |= {name: lab.env[name] for name in old}
            yield lab
    except LabMissingError as error:
        missing(str(error))
    finally:
        os.environ |= {name: value for name, value in old.items() if value is not None}
        for each in (root, root.with_name(f"{root.name}-b")):
            shutil.rmtree(each, ignore_errors=True)


@pytest.fixture(scope="session")
def vllm_env() -> Path:
    """The virtual environment of real vLLM, made on first use where this runs as root."""
    return _environment("install_vllm.sh")


@pytest.fixture(scope="session")
def trl_env() -> Path:
    """The same with TRL and PEFT."""
    return _environment("install_trl.sh")


def _environment(script: str) -> Path:
    check = [] if os.geteuid() == 0 else ["--check"]
    done = subprocess.run([FAKE.parent / "real" / script, *check], capture_output=True, text=True)
    if done.returncode:
        missing(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{script} failed")
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def litellm_proxy() -> Path:
    """The `litellm` command of the real proxy."""
    return _installed(programs.litellm_proxy)


def _installed(install: Callable[..., T], *what: str) -> T:
    try:
        return install(*what)
    except RuntimeError as error:
        return missing(str(error))


@pytest.fixture(scope="session")
def installed() -> Callable[..., Any]:
    """Install with a function of `programs`; what cannot be installed is missing."""
    return _installed


@pytest.fixture(scope="session")
def python_clients() -> Path:
    """The Python of an environment with clients of OpenAI's interface, 200 MB."""
    names = ("openai", "instructor", "pydantic-ai-slim[openai]", "langchain-openai", "llm")
    return _installed(programs.python_packages, "gateway-clients", *names) / "python"


@pytest.fixture(scope="session")
def npm_clients() -> Path:
    """A folder in which Node.js finds OpenAI's package."""
    return _installed(programs.node_packages, "gateway-clients-npm", "openai", "zod")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Debian's Chromium, installed on first use where this runs as root."""
    if not shutil.which("chromium"):
        with suppress(subprocess.CalledProcessError):
            debian.install("chromium", "fonts-dejavu-core")
    program = shutil.which("chromium")
    if not program:
        missing("no chromium here: install it, or run as root on Debian")
    return str(program)


@pytest.fixture
def site(lab: SlurmLab, tmp_path: Path) -> Iterator[Cluster]:
    """The lab as a site whose vLLM is the quick stand-in; its jobs end with the test."""
    command = tmp_path / "venv" / "bin" / "vllm"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    command.chmod(0o755)
    (command.parent / "activate").write_text(f"PATH={command.parent}:{Path(sys.executable).parent}:$PATH\n")
    environment = Environment(venv=tmp_path / "venv")
    yield Cluster(
        name="lab", partition="gpu", run_dir=tmp_path / "run", environment=environment, walltime=600, drain=60
    )
    lab.cancel_all()


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Model]:
    """Make a model whose stand-in server does what `fake` says."""

    def make(key: str = "m", fake: str = "", **values: object) -> Model:
        folder = tmp_path / "weights" / key
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()
        (folder / "fake").write_text(fake)
        return Model.model_validate({"key": key, "path": folder, "gpus_required": 1, "start_timeout": 60} | values)

    return make


@pytest.fixture
def seen() -> list[slurm.Job]:
    """What `on_state` is called with: pass `seen.append`."""
    return []
