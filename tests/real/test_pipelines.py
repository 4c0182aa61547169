"""What docs/pipelines.md shows for Snakemake, run by a real Snakemake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import python_packages
from provider import Loopback

pytestmark = pytest.mark.real
DOCS = Path(__file__).parent.parent.parent / "docs" / "pipelines.md"
RULE = """
rule align:
    output: "a.bam"
    shell: "echo 'STAR: out of memory' >&2; exit 137"
"""


def test_a_failed_snakemake_run_is_diagnosed(
    net: Loopback, waterfall: Any, tmp_path: Path, installed: Callable[..., Path]
) -> None:
    bin_ = installed(python_packages, "snakemake-9", "snakemake>=9,<10")
    server = net.serve(text="STAR ran out of memory: raise mem_mb of the rule align.")
    waterfall(first=server)
    found = re.search(r"```snakemake\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found
    (tmp_path / "Snakefile").write_text(RULE + found[1])
    path = f"{Path(sys.executable).parent}:{bin_}:{os.environ['PATH']}"
    run = subprocess.run(
        [bin_ / "snakemake", "--cores", "1", "--directory", tmp_path, "-s", tmp_path / "Snakefile", "a.bam"],
        env={**os.environ, "PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1, run.stderr
    assert (tmp_path / "diagnosis.txt").read_text() == "STAR ran out of memory: raise mem_mb of the rule align.\n"
    (request,) = server.completions
    prompt = request.body["messages"][-1]["content"]
    assert "Error in rule align" in prompt
    assert prompt.endswith("Name the rule and a fix.")
