"""A LoRA adapter in models.yaml: served by its base's job, counted by `fit`, a deployment of its own."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from biollm.config import Cluster, Config, load_config
from biollm.errors import ConfigError
from biollm.routing.deployments import build_deployments
from biollm.slurm.endpoints import Endpoint
from biollm.slurm.memory import GIB, adapter_parameters, fit
from biollm.slurm.script import render
from biollm.slurm.weights import present

BASE = {"hf_id": "lab/base", "context_length": 4096, "vllm_args": {"max_model_len": 2048}}
ADAPTER = {"base": "mine", "lora": "/adapters/tuned"}
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(**models: dict[str, Any]) -> Config:
        models = {"mine": BASE} | models
        (tmp_path / "models.yaml").write_text(yaml.safe_dump({"inherit": False, "models": models}, sort_keys=False))
        providers = {"gpu": {"type": "local", "models": ["mine"]}}
        (tmp_path / "providers.yaml").write_text(yaml.safe_dump({"inherit": False, "providers": providers}))
        return load_config(tmp_path)

    return load


def test_the_server_of_the_base_serves_its_adapters(load: Load) -> None:
    config = load(tuned=ADAPTER, other=ADAPTER | {"lora_rank": 24})
    text = render([config.models["mine"]], config.cluster).text.replace("\\\n", " ")
    words = shlex.split(text.partition("\nexec ")[2])
    assert words[words.index("--adapters") + 1] == "tuned,other"
    at = words.index("--lora-modules")
    assert words[at + 1 : at + 3] == ["tuned=/adapters/tuned", "other=/adapters/tuned"]
    assert "--enable-lora" in words
    assert words[words.index("--max-loras") + 1] == "2"
    assert words[words.index("--max-lora-rank") + 1] == "32"


def test_the_users_own_flags_of_the_base_win(load: Load) -> None:
    own = {"max_loras": 1, "max_lora_rank": 64, "lora_modules": ["hand=/by/hand"]}
    args = load(mine=BASE | {"vllm_args": own}, tuned=ADAPTER).models["mine"].vllm_args
    assert args == own | {"enable_lora": True, "lora_modules": ["hand=/by/hand", "tuned=/adapters/tuned"]}


def test_without_adapters_nothing_changes(load: Load) -> None:
    assert load().models["mine"].vllm_args == BASE["vllm_args"]


def test_an_adapter_has_what_its_base_has_unless_it_says_otherwise(load: Load) -> None:
    base = BASE | {"priority": 3, "tools": True, "scale": {"max": 2}}
    config = load(mine=base, tuned=ADAPTER | {"tools": False})
    tuned = config.models["tuned"]
    assert (tuned.key, tuned.hf_id, tuned.served_context, tuned.tools) == ("tuned", "lab/base", 2048, False)
    assert (tuned.priority, tuned.scale) == (None, None)  # one server, scaled once
    assert config.server_of("tuned") == config.server_of("mine") == config.models["mine"]
    assert config.server_of("absent") is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"base": "mine"}, "needs both `base`, a model, and `lora`"),
        ({"lora": "/a", "hf_id": "lab/x"}, "needs both `base`, a model, and `lora`"),
        (ADAPTER | {"base": "mime"}, "mime is not a local model with weights of its own. Did you mean mine?"),
        (ADAPTER | {"base": "tuned"}, "tuned is not a local model with weights of its own."),
        (ADAPTER | {"base": "cloud"}, "cloud is not a local model with weights of its own."),
        (ADAPTER | {"vllm_args": {"seed": 1}}, "vllm_args cannot be set for an adapter: its base mine is served."),
        (ADAPTER | {"scale": {"max": 2}}, "scale cannot be set for an adapter"),
        (ADAPTER | {"lora": "/a b"}, "no blank, comma or ="),
        (ADAPTER | {"lora_rank": 1024}, "at most 512"),
    ],
)
def test_a_wrong_entry_has_one_clear_sentence(load: Load, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tuned=entry, cloud={"type": "api"})
    (problem,) = caught.value.problems
    assert message in str(problem)
    assert problem.key.startswith("models.tuned")


def test_a_missing_adapter_is_found_before_a_job_waits(load: Load, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    base = {"path": str(tmp_path)}
    config = load(mine=base, tuned={"base": "mine", "lora": str(tmp_path / "adapter")})
    assert "Correct `lora` of tuned" in str(present(config.models["mine"], config.cluster))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    assert present(config.models["mine"], config.cluster) == tmp_path


def test_fit_counts_the_adapters() -> None:
    model = load_config().models["qwen-coder-32b"]
    assert model.architecture
    # 64 layers: queries and output of 5120 x 5120, keys and values of 5120 x 1024, three of 5120 x 27648
    parameters = 16 * 64 * (2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 27648))
    assert adapter_parameters(model.architecture, 16) == parameters
    plain = fit(model, Cluster())
    args = model.vllm_args | {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16}
    tuned = fit(model.model_copy(update={"vllm_args": args}), Cluster())
    assert tuned.weights_per_gpu_gib - plain.weights_per_gpu_gib == pytest.approx(4 * 2 * parameters / GIB)
    assert tuned.tokens < plain.tokens


def test_each_adapter_that_a_server_has_loaded_is_a_deployment(load: Load) -> None:
    config = load(tuned=ADAPTER, later=ADAPTER)

    def server(start: str, *adapters: str) -> Endpoint:
        url = f"http://n1:80{start}/v1"
        return Endpoint(start, "1", "s", "mine", "n1", url, Path("/k"), 0, 60.0, 1, adapters)

    found = build_deployments(config, [server("01", "tuned"), server("02")])
    assert [(d.id, d.base_url, d.litellm_model) for d in found] == [
        ("gpu/mine#01", "http://n1:8001/v1", "hosted_vllm/mine"),
        ("gpu/mine#02", "http://n1:8002/v1", "hosted_vllm/mine"),
        ("gpu/tuned#01", "http://n1:8001/v1", "hosted_vllm/tuned"),
        ("gpu/later", None, "hosted_vllm/later"),  # its entry is younger than both servers
    ]
