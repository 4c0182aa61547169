"""Every program in examples/ is run, against real servers; one against the embedded model."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import HTTP_400, HTTP_500
from conftest import Ran
from provider import Json, Loopback, Server

EXAMPLES = Path(__file__).parent.parent / "examples"
LOG = EXAMPLES / "nextflow_oom.log"
Waterfall = Callable[..., Path]
Run = Callable[..., Ran]

BASIC = """
# Auto-selects best available provider
client = get_model_client()
response = client.complete("Fix this Python error...")

# Force specific provider
client = get_model_client(provider="vllm", model="qwen-coder-32b")
"""
FALLBACK = """
router = ModelRouter()

# Will try providers in priority order until one works
response = router.complete(
    prompt="Analyze this error log...",
    fallback=True,
    max_retries=3
)
"""
HEALTH = """
status = check_all_providers()
# {
#   "lightning": {"available": True, "latency_ms": 120},
#   "gemini": {"available": True, "latency_ms": 85},
#   "vllm": {"available": False, "error": "Server not running"},
# }
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as `python examples/NAME ...` does, but in this process."""

    def example(name: str, *argv: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        message, code = "", 0
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            message = "" if isinstance(end.code, int) else str(end.code)
        out, err = capsys.readouterr()
        return Ran(code, out, err + message)

    return example


@pytest.mark.parametrize("name", ["cached_diagnosis", "ensemble", "error_diagnosis", "many_logs", "workflow_composer"])
def test_without_its_argument_an_example_shows_its_usage(run: Run, name: str) -> None:
    ran = run(f"{name}.py")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"usage: python examples/{name}.py ")


def test_a_file_that_is_missing_is_one_sentence(run: Run) -> None:
    assert run("error_diagnosis.py", "/nowhere.log").err == "/nowhere.log: No such file or directory."
    assert run("many_logs.py", "/nowhere").err == "/nowhere has no *.log files"


def snippet(name: str, words: str) -> dict[str, Any]:
    """Run a snippet that must stand in the file word for word; return its variables."""
    assert words in (EXAMPLES / name).read_text()
    return runpy.run_path(str(EXAMPLES / name))


def prompts(server: Server) -> list[str]:
    return [request.body["messages"][-1]["content"] for request in server.completions]


def test_every_example_has_a_test() -> None:
    tests = Path(__file__).read_text()
    programs = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")]
    assert len(programs) >= 7
    assert [name for name in programs if f'"{name}"' not in tests] == []


def test_basic_usage(net: Loopback, waterfall: Waterfall) -> None:
    first, own = net.serve(text="from the first"), net.serve(text="from vLLM", models=("qwen-coder-32b",))
    waterfall(first=first, vllm={"type": "local", "base_url": own.url, "models": ["qwen-coder-32b"]})
    found = snippet("seed_basic.py", BASIC)
    assert (str(found["response"]), prompts(first)) == ("from the first", ["Fix this Python error..."])
    assert found["client"].complete("hi").deployment == "vllm/qwen-coder-32b"


def test_with_fallback(net: Loopback, waterfall: Waterfall) -> None:
    second = net.serve(text="from the second")
    waterfall(first=net.refusing(), second=second)
    assert str(snippet("seed_fallback.py", FALLBACK)["response"]) == "from the second"
    assert prompts(second) == ["Analyze this error log..."]


def test_health_check(net: Loopback, waterfall: Waterfall) -> None:
    waterfall(lightning=net.serve(), vllm={"type": "local", "base_url": net.refusing(), "models": ["codellama-34b"]})
    status = snippet("seed_health.py", HEALTH)["status"]
    assert status["lightning"] == {"available": True, "latency_ms": status["lightning"]["latency_ms"]}
    assert status["vllm"]["available"] is False
    assert status["vllm"]["error"]


@pytest.mark.parametrize("takes_schema", [True, False])
def test_error_diagnosis(takes_schema: bool, net: Loopback, waterfall: Waterfall, run: Run) -> None:
    found = {"category": "memory", "cause": "STAR was killed.", "fix": "max_memory = '40 GB'", "confidence": 0.93}
    server = net.serve(answer=lambda body: {"role": "assistant", "content": f"```json\n{json.dumps(found)}\n```"})
    waterfall(first={"base_url": server.url, "json_schema": takes_schema})
    ran = run("error_diagnosis.py", LOG)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == [
        "category    memory",
        "cause       STAR was killed.",
        "fix         max_memory = '40 GB'",
        "confidence  93%, says first/small",
    ]
    (request,) = server.completions
    assert "exit status (137)" in str(request.body["messages"])
    assert ("response_format" in request.body) is takes_schema


def test_error_diagnosis_says_why_nobody_answered(net: Loopback, waterfall: Waterfall, run: Run) -> None:
    waterfall(first=net.serve(then=HTTP_500))
    ran = run("error_diagnosis.py", LOG)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == ["All deployments failed.", "  first/small: HTTP 500: Internal server error."]


def test_ensemble(net: Loopback, waterfall: Waterfall, run: Run) -> None:
    texts = [json.dumps({"category": each, "cause": f"{each}!"}) for each in ("memory", "disk", "memory")]
    servers = {name: net.serve(text=text) for name, text in zip("abc", texts, strict=True)}
    waterfall(**servers)
    ran = run("ensemble.py", LOG)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == [
        "memory (67% agree): memory!",
        "  a/small: category='memory' cause='memory!'",
        "  b/small: category='disk' cause='disk!'",
        "  c/small: category='memory' cause='memory!'",
    ]


def test_workflow_composer_sends_a_wrong_order_back(net: Loopback, waterfall: Waterfall, run: Run) -> None:
    align = {"tool": "STAR_ALIGN", "reads_from": ["TRIMGALORE"], "why": "align"}
    trim = {"tool": "TRIMGALORE", "reads_from": [], "why": "trim adapters"}
    answers = [{"steps": [align, trim]}, {"steps": [trim, align]}]

    def answer(_: Json) -> Json:
        return {"role": "assistant", "content": json.dumps(answers.pop(0))}

    server = net.serve(answer=answer)
    waterfall(first=server)
    ran = run("workflow_composer.py", "Align paired-end RNA-seq")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == [
        "1. TRIMGALORE       reads the FASTQ files: trim adapters",
        "2. STAR_ALIGN       reads TRIMGALORE: align",
    ]
    assert "STAR_ALIGN reads from TRIMGALORE, which no earlier step runs" in prompts(server)[1]


def test_many_logs(net: Loopback, waterfall: Waterfall, run: Run) -> None:
    def answer(body: Json) -> Json:
        return {"role": "assistant", "content": f"{len(body['messages'][0]['content'])} characters"}

    waterfall(first=net.serve(answer=answer))
    ran = run("many_logs.py", EXAMPLES / "logs")
    logs = sorted((EXAMPLES / "logs").glob("*.log"))
    assert (ran.code, len(logs)) == (0, 6)
    assert [line.split(": ")[0] for line in ran.out.splitlines()[-6:]] == [log.name for log in logs]
    assert "100%" in ran.out


def test_many_logs_goes_on_where_one_fails(net: Loopback, waterfall: Waterfall, run: Run) -> None:
    waterfall(first=net.serve(HTTP_400))
    ran = run("many_logs.py", EXAMPLES / "logs")
    assert ran.code == 1
    answers = [line.split(": ", 1)[1] for line in ran.out.splitlines()[-6:]]
    assert sorted(answers) == ["All is well."] * 5 + ["no answer: The request was rejected."]


def test_autoscale_day(run: Run) -> None:
    ran = run("autoscale_day.py", "2")
    assert ran.code == 0, ran.err
    fixed, scaled = (line.split() for line in ran.out.splitlines() if " s " in line and " USD" in line)
    assert (fixed[:4], scaled[:3]) == (["one", "fixed", "server", "24.0"], ["scale,", "max", "2"])
    assert float(scaled[3]) < 24
    assert ran.out.count("  up\n") > 1


def test_cached_diagnosis(net: Loopback, waterfall: Waterfall, run: Run, tmp_path: Path) -> None:
    server = net.serve(text="It ran out of memory.")
    waterfall(first=server)
    for sample in ("tumor_7", "liver_2"):
        (tmp_path / f"{sample}.log").write_text(LOG.read_text().replace("KO_REP2", sample))
    first, second = (run("cached_diagnosis.py", tmp_path / f"{name}.log", name) for name in ("tumor_7", "liver_2"))
    assert first.out.splitlines() == ["It ran out of memory.", "new answer of first/small"]
    note, *rest = second.out.splitlines()
    assert rest == ["It ran out of memory.", "stored answer of first/small"]
    assert "for a similar request: Why did this task fail, and what should be changed?; tumor_7.log: Nov-14" in note
    assert len(server.completions) == 1


@pytest.mark.slow
def test_pipe(net: Loopback, waterfall: Waterfall) -> None:
    server = net.serve(text="It ran out of memory.")
    waterfall(first=server)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        [EXAMPLES / "pipe.sh", LOG], capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (0, "It ran out of memory.\n")
    assert prompts(server) == [f"{LOG.read_text()}\n\nwhy did this fail?"]


def test_tune(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        [EXAMPLES / "tuning" / "tune.sh", "qwen-coder-32b", tmp_path],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}, timeout=60,
    )  # fmt: skip
    assert f"{tmp_path}/train.jsonl: 16 examples\n{tmp_path}/train.held-out.jsonl: 8 examples, held out\n" in ran.stdout
    assert ran.stdout.endswith(f"Next: biollm tune up qwen-coder-32b {tmp_path}/train.jsonl\n")
    assert f"--data {tmp_path}/train.jsonl" in (tmp_path / "train.sh").read_text()


@pytest.mark.slow
def test_demo(weights: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOLLM_STATE_DIR", str(weights.parent.parent))
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"], capture_output=True, text=True, check=True, timeout=120
    )
    first, condensed, dead, last = re.split(r"^--- \d\. .*\n", ran.stdout, flags=re.MULTILINE)[1:]
    assert "embedded/smollm2-135m would answer." in first
    assert "oom_kill" in condensed
    assert "STAR was killed for its memory (exit status 137)" in dead
    assert "[degraded: small local model, no diagnosis]\n\nWhat nextflow_oom.log says:\n" in last
    assert "· asking dead/any-model" in ran.stderr


@pytest.mark.slow
def test_gateway(net: Loopback, waterfall: Waterfall, runtime: Path, run: Run) -> None:
    server = net.serve(text="It ran out of memory.")
    waterfall(first=server)
    ran = run("gateway.py", "why?")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == [
        "socket  It ran out of memory.  (by first/small)",
        "stream  It ran out of memory.",
        "port    It ran out of memory.",
        "no key  HTTP 401",
    ]
    assert prompts(server) == ["why?"] * 3
    assert not (runtime / "gateway.sock").exists()


@pytest.mark.slow
def test_the_embedded_model_reads_an_excerpt(waterfall: Waterfall, weights: Path, biollm: Run) -> None:
    model = {"type": "embedded", "gguf": str(weights), "context_length": 8192}
    waterfall({"models": {"smollm2-135m": model}}, embedded={"type": "embedded", "models": ["smollm2-135m"]})
    ran = biollm("complete", "Why did this Nextflow run fail?", "-f", LOG, "--max-tokens", "20", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["text"].strip()
    assert (ran.json["degraded"], ran.json["cost_usd"]) == (True, 0)
    assert 200 < ran.json["usage"]["prompt_tokens"] < 600
    assert "degraded: the small embedded model answered" in ran.err
