"""What is shipped, what is exported, and what an import costs."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import biollm
from biollm import client

ROOT = Path(__file__).parent.parent
NEEDS_LITELLM = {
    "biollm.routing.callback",
    "biollm.routing.litellm_router",
    "biollm.routing.waterfall",
    "biollm.providers.llama",
}
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(biollm.__path__, "biollm.") if module.name not in NEEDS_LITELLM
)


def test_no_python_process_takes_code_from_the_working_directory() -> None:
    sources = [path.read_text() for path in (ROOT / "biollm").rglob("*.py")]
    started = [found for source in sources for found in re.findall(r"\[sys\.executable, (.{4})", source)]
    assert started == ['"-P"'] * 3


def test_the_exported_names_are_these() -> None:
    assert client.__all__ == [
        "AllLimitedError",
        "Attempt",
        "BiollmError",
        "Client",
        "Completion",
        "CompletionError",
        "ConfigError",
        "ContentPolicyError",
        "DeadlineError",
        "Defaults",
        "InterruptedStreamError",
        "KeysRefusedError",
        "ModelRouter",
        "Options",
        "PromptTooLongError",
        "RequestRejectedError",
        "StreamChunk",
        "StreamRestarted",
        "UnknownNameError",
        "Usage",
        "UsageError",
        "check_all_providers",
        "condense",
        "get_model_client",
        "normalize_log",
    ]
    assert all(hasattr(client, name) for name in client.__all__)


@pytest.mark.parametrize("name", ["complete", "stream", "complete_many", "fill_in_middle", "ensemble"])
def test_sync_and_async_take_the_same(name: str) -> None:
    def parameters(function: Any) -> Any:
        return inspect.signature(function).parameters

    assert parameters(getattr(client.Client, name)) == parameters(getattr(client.Client, f"a{name}"))


def test_no_module_but_those_of_a_completion_imports_litellm() -> None:
    code = f"import sys, importlib; [importlib.import_module(m) for m in {MODULES!r}]; print('litellm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_version_is_one() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == biollm.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built through the source distribution beside a developer's ignored file."""
    out = tmp_path_factory.mktemp("dist")
    (ROOT / "router_config" / "secrets.local.yaml").touch()
    try:
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
        subprocess.run(command, check=True, capture_output=True, timeout=200)
    finally:
        (ROOT / "router_config" / "secrets.local.yaml").unlink()
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    package = {name for name in tracked if name.startswith("biollm/")}
    data = {f"biollm/_data/{name}" for name in tracked if name.startswith(("router_config/", "slurm_templates/"))}
    assert names == package | data


@pytest.mark.slow
def test_the_wheel_works_far_from_its_source(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "lib")
    code = "import sys, biollm.cli.app as c; assert 'lib' in c.__file__; sys.argv = ['biollm', *{}]; sys.exit(c._run())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    for argv in (["config", "--check"], ["models"], ["explain"], ["render-slurm", "qwen-coder-32b"]):
        command = [sys.executable, "-c", code.format(argv)]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert ran.returncode in ((0, 69) if argv == ["explain"] else (0,)), ran.stderr  # 69: no key, no weights


def test_every_async_method_is_a_pair() -> None:
    methods = {name for name, _ in inspect.getmembers(client.Client, inspect.iscoroutinefunction) if name[0] != "_"}
    assert methods == {"acomplete", "acomplete_many", "aensemble", "afill_in_middle"}


def test_the_picture_of_the_layers_is_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    stated = [re.findall(r"\w+", layer) for layer in contract]
    picture = re.search(r"## Layers.*?```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert picture
    drawn = [re.findall(r"\w+", line.split("  ")[0]) for line in picture[1].splitlines()]
    assert drawn == [names for names in stated if names != ["endpoints"]]
