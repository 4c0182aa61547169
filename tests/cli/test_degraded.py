"""An answer of the small local model is marked where it counts, can be refused, and comes after what the log says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import HTTP_401
from provider import Loopback

from biollm.client import Completion, CompletionError, get_model_client

MARK = "[degraded: small local model, no diagnosis]"
CAUSE = "Process `STAR (sample_1)` terminated with an error exit status (137)"
Run = Callable[..., Any]
pytestmark = pytest.mark.slow  # the real model


@pytest.fixture(autouse=True)
def alone(waterfall: Any, weights: Path) -> None:
    """A waterfall of the embedded model alone."""
    model = {"type": "embedded", "gguf": str(weights), "context_length": 2048}
    waterfall({"models": {"tiny": model}}, local={"type": "embedded", "models": ["tiny"]})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (file := tmp_path / "nextflow.log").write_text("INFO all is well\n" * 4_000 + f"ERROR ~ {CAUSE}\n")
    return file


@pytest.mark.parametrize("how", ["--no-stream", "--stream"])
def test_the_mark_is_the_first_line_and_the_log_comes_before_the_text(biollm: Run, log: Path, how: str) -> None:
    ran = biollm("complete", "Why did this fail?", "-f", log, how, "--max-tokens", "8")
    assert ran.code == 0
    first, blank, heading, *rest = ran.out.splitlines()
    assert (first, blank, heading) == (MARK, "", "What nextflow.log says:")
    assert any(CAUSE in line for line in rest[: rest.index("What the model says:")])
    assert len(ran.out) < 3_000


def test_without_a_file_the_mark_alone_precedes_the_text(biollm: Run) -> None:
    mark, *text = biollm("complete", "hi", "--max-tokens", "8").out.splitlines()
    assert mark == MARK
    assert text


def test_json_and_terminals_tell_it_otherwise(biollm: Run) -> None:
    assert biollm("complete", "hi", "--json", "--max-tokens", "8").json["degraded"] is True


@pytest.mark.parametrize("by_variable", [False, True])
def test_it_can_be_refused(biollm: Run, monkeypatch: pytest.MonkeyPatch, by_variable: bool) -> None:
    if by_variable:
        monkeypatch.setenv("BIOLLM_NO_DEGRADED", "1")
    ran = biollm("complete", "hi", *([] if by_variable else ["--no-degraded"]))
    assert (ran.code, ran.out) == (69, "")
    assert "the embedded model gives degraded answers" in ran.err


def test_the_variable_holds_in_python_too(monkeypatch: pytest.MonkeyPatch) -> None:
    client = get_model_client()
    monkeypatch.setenv("BIOLLM_NO_DEGRADED", "1")
    with pytest.raises(CompletionError, match="degraded answers"):
        client.complete("hi", allow_degraded=True)


@pytest.mark.parametrize("name", ["provider", "model"])
def test_naming_the_embedded_model_allows_it(name: str) -> None:
    options: Any = {name: {"provider": "local", "model": "tiny"}[name], "max_tokens": 4}
    answer = get_model_client().complete("hi", **options)
    assert isinstance(answer, Completion)
    assert answer.degraded
    with pytest.raises(CompletionError, match="degraded answers"):
        get_model_client().complete("hi", allow_degraded=False, **options)


def test_a_stream_through_a_pipe_is_marked_by_the_gateway_too(gateway: Run, log: Path) -> None:
    gateway()
    argv = [Path(sys.executable).with_name("biollm"), "complete", "Why?", "-f", log, "--stream", "--max-tokens", "4"]
    out = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout
    assert out.startswith(f"{MARK}\n\nWhat nextflow.log says:\n")
    assert CAUSE in out


def test_what_failed_before_is_named(biollm: Run, waterfall: Any, net: Loopback, weights: Path) -> None:
    model = {"type": "embedded", "gguf": str(weights), "context_length": 2048}
    rungs = {"first": net.serve(then=HTTP_401), "local": {"type": "embedded", "models": ["tiny"]}}
    waterfall({"models": {"tiny": model}}, **rungs)
    for _ in range(2):  # the second time the key is on cooldown
        err = biollm("complete", "hi", "--max-tokens", "4").err
        assert re.search(r"^first: HTTP 401: .* \(key: FIRST_KEY\)", err, re.MULTILINE)
