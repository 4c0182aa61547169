"""What the tests share: a loopback network, folders of their own, and a waterfall written in one line.

def test_the_second_answers(net, waterfall):
    waterfall(first=net.refusing(), second=net.serve(text="from second"))
    assert str(get_model_client().complete("hi")) == "from second"
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from provider import Loopback, Server

from biollm._runtime import ledger
from biollm.cli.app import _run
from biollm.config import load_config
from biollm.errors import UnavailableError
from biollm.gateway import server as _serve
from biollm.providers import embedded

KEYS = "LIGHTNING_API_KEY GOOGLE_API_KEY GEMINI_API_KEY OPENAI_API_KEY HF_TOKEN OPENAI_BASE_URL OPENAI_API_BASE"
Candidate = Server | str | Mapping[str, Any]


def pytest_configure() -> None:
    """Check the LiteLLM that is installed, and let the programs that tests start be interrupted.

    It must be the one that pyproject.toml or `make test LITELLM=...` asks for. A shell's background jobs, and what they
    start, ignore SIGINT.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = next(each for each in map(Requirement, project["dependencies"]) if each.name == "litellm").specifier
    chosen = os.environ.get("LITELLM")
    if version("litellm") not in (SpecifierSet(f"=={chosen}") if chosen else wanted):
        pytest.exit(f"litellm {version('litellm')} is installed, not {chosen or wanted}: run `make .venv/.dev`", 2)


def until(true: Callable[[], Any], seconds: float = 30) -> float:
    """Wait until something is true; return the seconds it took."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() < start + seconds, "it never came true"
        time.sleep(0.01)
    return time.monotonic() - start


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Mount a file system without any room at `folder`; skip the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode:
        pytest.skip("may not mount here")
    try:
        with suppress(OSError):
            (folder / "filler").write_bytes(bytes(1 << 20))
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    """Servers of one module's tests."""
    with Loopback() as net:
        yield net


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of this test alone; no test sees the user's files, keys or proxies."""
    for name in os.environ:
        if name.startswith("BIOLLM_") and name != "BIOLLM_REQUIRE_REAL":
            monkeypatch.delenv(name)
    for name in (*KEYS.split(), "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("NO_PROXY", "no_proxy"):  # set, so that the test's end takes back the local hosts that a client adds
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.setenv("BIOLLM_SITE_CONFIG", str(tmp_path / "site"))
    monkeypatch.setenv("BIOLLM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("BIOLLM_GATEWAY", "off")
    return tmp_path / "state"


@pytest.fixture
def waterfall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a configuration of these providers alone, in this order, and use it.

    A server or a URL stands for an API provider with the one model `small` and a key `sk-planted-NAME-...` in the
    variable NAME_KEY; a mapping gives further keys or other values. `top` holds keys of the file's top.
    """

    def write(top: Mapping[str, Any] | None = None, /, **rungs: Candidate) -> Path:
        folder = tmp_path / "config"
        folder.mkdir(exist_ok=True)
        entries = {name: _entry(name, place, candidate) for place, (name, candidate) in enumerate(rungs.items(), 1)}
        for name in rungs:
            monkeypatch.setenv(f"{name.upper()}_KEY", f"sk-planted-{name}-0123456789")
        whole = {"inherit": False, "providers": entries, **(top or {})}
        (folder / "providers.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(folder))
        return folder

    return write


def _entry(name: str, place: int, candidate: Candidate) -> dict[str, Any]:
    given = (
        {"base_url": candidate.url}
        if isinstance(candidate, Server)
        else {"base_url": candidate}
        if isinstance(candidate, str)
        else candidate
    )
    entry = {"type": "api", "priority": place, "models": ["small"], "env_key": f"{name.upper()}_KEY", **given}
    if entry["type"] != "api" or "accounts" in entry or "key_file" in entry:
        entry = {key: value for key, value in entry.items() if key != "env_key" or key in given}
    return entry


@pytest.fixture
def paid(state: Path) -> Callable[..., dict[str, Any]]:
    """Make a provider beyond this machine, as prices go: what stands in the file as loopback is local, and free.

    It is an account of GitHub Copilot's, whose token says where requests go; its key is sk-planted-NAME-...
    """

    def make(server: Server | str, name: str, model: str = "gpt-4o-mini", **more: Any) -> dict[str, Any]:
        folder = state / "github_copilot" / name
        folder.mkdir(parents=True, exist_ok=True)
        api = server if isinstance(server, str) else server.url
        token = {"token": f"sk-planted-{name}-0123456789", "expires_at": time.time() + 3600, "endpoints": {"api": api}}
        (folder / "api-key.json").write_text(json.dumps(token))
        (folder / "access-token").write_text("ghu-planted")
        return {"litellm_provider": "github_copilot", "accounts": [{"name": name}], "models": [model], **more}

    return make


@pytest.fixture(scope="session")
def weights() -> Path:
    """The embedded model's weights, kept in the user's cache folder between runs."""
    model = load_config().models["smollm2-135m"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biollm" / "tests"
    try:
        return embedded.pull(model, cache)
    except UnavailableError as error:
        if os.environ.get("BIOLLM_REQUIRE_REAL"):
            raise
        pytest.skip(str(error))


class Ran(NamedTuple):
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def biollm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process, up to its exit code, and let it write what its own process would at exit."""

    def run(*argv: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["biollm", *map(str, argv)])
        capsys.readouterr()
        code = _run()
        ledger().flush()
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the socket of this test's gateway, with a name that is short enough; the gateway is looked for."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.delenv("BIOLLM_GATEWAY")
        yield Path(folder) / "biollm"


@pytest.fixture
def gateway(runtime: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Start the gateway in a process of its own, as `biollm serve --detach` does; return its record."""
    yield lambda *arguments: _serve.detach(arguments)[0]
    assert _serve.stop(30)
