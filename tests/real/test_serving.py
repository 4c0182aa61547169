"""From a rendered script to an answer: real Slurm, real vLLM, real weights of SmolLM2.

Two models share the first job, which most tests use, since vLLM takes a minute to start on a CPU.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_lab import SlurmLab, wait_until

from biollm import slurm
from biollm.client import Client, get_model_client
from biollm.config import Cluster, Environment, Model
from biollm.monitoring.snapshot import Collector
from biollm.slurm.endpoints import Endpoint, ask, figures, read_key
from biollm.slurm.script import Options
from biollm.slurm.submissions import Job

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]
ARGS = {"enforce_eager": True, "max_model_len": 1024}
# one thread each: with more, OpenMP's barriers spin against each other on a small shared machine
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def smollm(env: Path, key: str) -> Model:
    return Model(key=key, path=env / "share" / "smollm2-135m", start_timeout=400, context_length=1024, vllm_args=ARGS)


@pytest.fixture(scope="session")
def cpu_site(lab: SlurmLab, vllm_env: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The lab with real vLLM."""
    run = tmp_path_factory.mktemp("serving") / "run"
    environment = Environment(venv=vllm_env, env=CPU)
    return Cluster(name="lab", partition="gpu", run_dir=run, environment=environment, walltime=3600, drain=75)


@pytest.fixture(scope="session")
def served(lab: SlurmLab, cpu_site: Cluster, vllm_env: Path) -> Iterator[tuple[Job, float]]:
    """One job with two models, up; and how long `up` took after the last record was published."""
    published: dict[str, float] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            for path in (Path(str(cpu_site.run_dir)) / "biollm" / "records").glob("*.json"):
                published.setdefault(path.stem, time.monotonic())

    looking = threading.Thread(target=look)
    looking.start()
    (job,) = slurm.up([smollm(vllm_env, "smollm-a"), smollm(vllm_env, "smollm-b")], cpu_site)
    late = time.monotonic() - max(published.values())
    done.set()
    looking.join()
    yield job, late
    slurm.down(cpu_site)


@pytest.fixture
def endpoint(served: tuple[Job, float]) -> Endpoint:
    return served[0].endpoints[0]


def test_up_returns_soon_after_the_record(served: tuple[Job, float]) -> None:
    job, late = served
    print(f"up returned {late:.2f} s after the last record")
    assert {endpoint.model for endpoint in job.endpoints} == {"smollm-a", "smollm-b"}
    assert late < 5  # 1 s on an idle machine; this one is shared


@pytest.fixture
def configured(cpu_site: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Client]:
    """Make a client whose only rung is a local model: no address, no key."""

    def make(key: str) -> Client:
        folder = tmp_path / "config"
        folder.mkdir()
        provider = {"type": "local", "priority": 5, "models": [key]}
        files: dict[str, Any] = {"providers": {"inherit": False, "providers": {"vllm": provider}}}
        files["models"] = {"models": {key: {"type": "local", "hf_id": "HuggingFaceTB/SmolLM2-135M-Instruct"}}}
        files["cluster"] = {"cluster": {"name": "lab", "run_dir": str(cpu_site.run_dir)}}
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(text))
        monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(folder))
        return get_model_client()

    return make


def test_it_answers_through_the_client_without_configuration_of_its_address(
    served: tuple[Job, float], configured: Callable[[str], Client]
) -> None:
    began = time.monotonic()
    answer = configured("smollm-a").complete("Say hello.", max_tokens=8, timeout=120)
    print(f"first answer of a new client {time.monotonic() - began:.2f} s")
    assert answer.text
    assert answer.provider == "vllm"
    assert answer.deployment.partition("#")[2] in {endpoint.start[:8] for endpoint in served[0].endpoints}


def test_top_shows_the_job_and_its_rung(served: tuple[Job, float], configured: Callable[[str], Client]) -> None:
    shot = Collector.of_process(configured("smollm-a").config).snapshot()
    (job,) = (view for view in shot.jobs if view.job == served[0].submission.job)
    assert (job.models, job.phase) == ("smollm-a, smollm-b", "ready")
    assert 0 < job.left_s <= 3600
    assert shot.candidates[0].state == "ready"


def routes(endpoint: Endpoint) -> list[tuple[str, str]]:
    """Every route of the running server, from its own OpenAPI description and its log."""
    _, text = ask(endpoint, "GET", "/openapi.json", timeout=30)
    found = {(method.upper(), path) for path, methods in json.loads(text)["paths"].items() for method in methods}
    more = {("GET", path) for path in ("/", "/docs", "/redoc", "/metrics", "/openapi.json", "/docs/oauth2-redirect")}
    return sorted(found | more)


def status_of(endpoint: Endpoint, method: str, path: str, key: str | None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = b"{}" if method in ("POST", "PUT", "PATCH") else None
    url = endpoint.base_url.removesuffix("/v1") + path
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def test_every_route_but_health_needs_the_key(endpoint: Endpoint) -> None:
    walked = [(method, path.replace("{response_id}", "x")) for method, path in routes(endpoint)]
    assert len(walked) > 25
    opened = [(m, p) for m, p in walked for key in (None, "wrong") if status_of(endpoint, m, p, key) != 401]
    assert opened == [("GET", "/health"), ("GET", "/health")]
    assert status_of(endpoint, "GET", "/v1/models", read_key(endpoint)) == 200


def test_the_key_is_nowhere_but_in_its_file(
    served: tuple[Job, float], cpu_site: Cluster, lab: SlurmLab, endpoint: Endpoint
) -> None:
    key = read_key(endpoint).encode()
    for root in (lab.root, Path(str(cpu_site.run_dir))):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert key not in path.read_bytes() or path.name == "key", path
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert key not in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue


def test_status_tells_the_requests_at_each_server(cpu_site: Cluster, endpoint: Endpoint) -> None:
    asking = threading.Thread(
        target=ask, args=(endpoint, "POST", "/v1/completions", long(endpoint)), kwargs={"timeout": 120}
    )
    asking.start()

    def busy() -> bool:
        said = figures(ask(endpoint, "GET", "/metrics", timeout=3)[1])
        told = any(job.requests.get(endpoint.start) == (1, 0) for job in slurm.status(cpu_site))
        return told and said is not None and said.running == 1 and 0 < said.cache <= 1

    wait_until(busy, 30, "a running request in status, and in the figures that replicas are balanced by")
    asking.join()


def long(endpoint: Endpoint, tokens: int = 200) -> dict[str, Any]:
    return {"model": endpoint.model, "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}


def test_a_handover_under_load_fails_no_request(
    cpu_site: Cluster, vllm_env: Path, lab: SlurmLab, configured: Callable[[str], Client]
) -> None:
    """Five minutes of walltime; the second link is ready before the first is told to leave, and both serve."""
    slurm.down(cpu_site)  # this machine may have two cores
    five_minutes = cpu_site.model_copy(update={"walltime": 300})
    slurm.up([smollm(vllm_env, "smollm-c")], five_minutes, Options(handover=True), wait=False)
    first, second = slurm.find(cpu_site, "smollm-c")
    lab.run("scontrol", "update", f"jobid={second.job}", "Dependency=", check=False)  # now, not in minutes
    slurm.wait_for([first], cpu_site)
    answers: dict[str, int] = {}
    slowest = 0.0
    failed: list[str] = []
    done = threading.Event()
    client = configured("smollm-c")

    def load() -> None:
        nonlocal slowest
        while not done.is_set():
            began = time.monotonic()
            try:
                server = client.complete("Once upon a time", max_tokens=8, timeout=60).deployment
                answers[server] = answers.get(server, 0) + 1
            except Exception as error:
                failed.append(repr(error))
            slowest = max(slowest, time.monotonic() - began)

    loading = [threading.Thread(target=load) for _ in range(2)]
    for thread in loading:
        thread.start()
    try:
        wait_until(lambda: len(answers) == 2, 300, "answers of both links")
        lab.run("scancel", "--batch", "--signal=USR1", first.job)  # as Slurm does before the end
        wait_until(lambda: slurm.find(cpu_site, first.job)[0].events[-1]["state"] == "stopped", 90, "the handover")
    finally:
        done.set()
        for thread in loading:
            thread.join()
    told = f"{sum(answers.values())} answers by {len(answers)} servers, slowest {slowest:.1f} s, {len(failed)} failed"
    print(told)
    assert failed == []
    slurm.down(cpu_site)


def test_two_ranks_of_one_model_on_two_nodes(cpu_site: Cluster, vllm_env: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((vllm_env / "share" / "smollm2-135m" / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "model.safetensors").touch()  # the weights are dummies
    args = ARGS | {"tensor_parallel_size": 2, "load_format": "dummy", "gpu_memory_utilization": 0.3}
    tiny = Model(key="tiny", path=folder, gpus_required=2, start_timeout=400, vllm_args=args)
    spread = cpu_site.model_copy(update={"gpus_per_node": 1, "walltime": 1800})
    (job,) = slurm.up([tiny], spread)
    (endpoint,) = job.endpoints
    assert job.submission.nodes == 2
    assert ask(endpoint, "POST", "/v1/completions", long(endpoint, 4), timeout=120)[0] == 200
    slurm.down(cpu_site, "tiny")
    (over,) = [now for now in slurm.status(cpu_site) if now.submission.id == job.submission.id]
    assert (over.phase, over.reason) == ("ended", "down")


TINY = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 49152,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
}  # fmt: skip
