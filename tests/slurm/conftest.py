"""What the tests of Slurm share: commands that answer as the real ones do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Answer = Callable[[str, str], None]


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Put a command on the PATH that runs this shell text; each call is written to calls.txt with its arguments."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def put(command: str, text: str) -> None:
        path = tmp_path / "bin" / command
        path.write_text(f'#!/bin/sh\necho {command} "$@" >>{tmp_path}/calls.txt\n{text}\n')
        path.chmod(0o755)

    return put
