"""From examples to an adapter that answers: real Slurm, TRL and PEFT, real vLLM, SmolLM2's real weights, on a CPU.

The base does not know the codes that one group gives its failures. About three minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from slurm_lab import SlurmLab, wait_until
from test_serving import ARGS, CPU

from biollm import slurm
from biollm.client import get_model_client
from biollm.config import load_config

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]
BIOLLM = Path(sys.executable).with_name("biollm")
# vLLM's CPU build applies the adapter in the last slot to the base's requests beside it (vllm-project/vllm#48421)
SPARE = {"max_loras": 2}
ANSWERS = Path(__file__).parents[2] / "examples" / "tuning" / "answers.jsonl"
TRAINING = ("--epochs", "12", "--learning-rate", "0.002", "--rank", "8", "--length", "256")


@pytest.fixture
def folder(lab: SlurmLab, trl_env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration whose one provider serves SmolLM2 on the lab."""
    model = {"path": str(trl_env / "share" / "smollm2-135m"), "start_timeout": "400s", "context_length": 1024}
    environment = {"venv": str(trl_env), "env": CPU}
    cluster = {"name": "lab", "partition": "gpu", "run_dir": str(tmp_path / "run"), "environment": environment}
    provider = {"type": "local", "priority": 5, "models": ["smollm"]}
    folder = tmp_path / "config"
    folder.mkdir()
    for name, content in {
        "models": {"models": {"smollm": model | {"vllm_args": ARGS | SPARE}}},
        "providers": {"providers": {"vllm": provider}},
        "cluster": {"cluster": cluster | {"walltime": "1:00:00", "drain": "75s"}},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"inherit": False} | content))
    monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(folder))
    return folder


def biollm(*words: str | Path) -> str:
    done = subprocess.run([BIOLLM, *words], capture_output=True, text=True, timeout=600)
    print("$ biollm", *words, "\n" + done.stderr + done.stdout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_adapter_is_trained_across_a_requeue_and_answers_what_its_base_does_not_know(
    lab: SlurmLab, folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "train.jsonl"
    biollm("tune", "export", "--from", ANSWERS, "-o", data)

    training = subprocess.Popen([BIOLLM, "tune", "up", "smollm", data, *TRAINING], stderr=subprocess.PIPE, text=True)
    output = tmp_path / "run" / "models" / "adapters" / "smollm-tuned"
    progress = output / "progress.jsonl"
    wait_until(lambda: "step 2 of" in _text(progress), 300, "the second step")
    cluster = load_config().cluster
    (job,) = slurm.status(cluster)
    assert (job.phase, job.submission.models) == ("training", ("smollm-tuned",))
    lab.run("scancel", "--batch", "--signal=USR1", job.submission.job)  # as Slurm does before the end
    _, shown = training.communicate(timeout=600)
    print(shown)
    assert training.returncode == 0
    assert "resuming from checkpoint-" in shown
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, steps[-1]["steps"] + 1))
    assert {line["restart"] for line in steps} == {0, 1}
    assert steps[-1]["loss"] < steps[0]["loss"] / 4

    entry = biollm("tune", "entry", "smollm")
    models = yaml.safe_load((folder / "models.yaml").read_text())
    models["models"] |= yaml.safe_load(entry)["models"]
    (folder / "models.yaml").write_text(yaml.safe_dump(models))
    biollm("up", "smollm-tuned")
    try:
        held_out = data.with_suffix(".held-out.jsonl")
        asked, code = json.loads(held_out.read_text().splitlines()[-1]).values()
        arms = ("compare", "--a", "smollm", "--b", "smollm-tuned", "--temperature", "0", "--max-tokens", "16")
        biollm(*arms, "-o", tmp_path / "compared.jsonl", held_out)
        report = json.loads(biollm(*arms, "-o", tmp_path / "compared.jsonl", "--json", held_out))
        scores = {arm["name"]: arm["score"] for arm in report["arms"]}
        assert scores["smollm"] == 0
        assert scores["smollm-tuned"] >= 0.75
        answer = get_model_client(temperature=0, model="smollm-tuned").complete(asked[0]["content"])
        assert (answer.text, answer.provider) == (code, "vllm")
    finally:
        biollm("down", "--all")


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""
