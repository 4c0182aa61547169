"""Adds a model to the user's models.yaml, with its architecture numbers, leaving every comment there in place."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from biollm.config import Architecture, Cluster, Model, edit
from biollm.config.loader import sentence
from biollm.errors import UsageError
from biollm.slurm.architecture import architecture_from_config
from biollm.slurm.memory import fit
from biollm.slurm.weights import published_config


def entry(hf_id: str, published: dict[str, Any], cluster: Cluster, key: str | None = None) -> Model:
    """Return the model that a published config.json describes, on the fewest GPUs that hold it.

    Where its whole context does not fit, `max_model_len` says what does.
    """
    name = hf_id.rpartition("/")[2]
    architecture = architecture_from_config(published)
    model: dict[str, Any] = {"key": key or name.lower(), "name": name, "hf_id": hf_id, "architecture": architecture}
    model |= {"size_gb": round(architecture.weight_bytes / 1e9, 1), "context_length": architecture.context or None}
    try:
        sizes = [Model(**model, gpus_required=2**n, vllm_args={"tensor_parallel_size": 2**n}) for n in range(7)]
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))} {sentence(first)}") from None
    reports = [(size, fit(size, cluster)) for size in sizes]
    if fitting := next((size for size, report in reports if report.fits), None):
        return fitting
    for size, report in reports:
        length = min(report.tokens, report.max_model_len) // 1024 * 1024
        limited = size.model_copy(update={"vllm_args": {**size.vllm_args, "max_model_len": length}})
        if length and fit(limited, cluster).fits:
            return limited
    return sizes[0]  # nothing holds it: `biollm fit` says why


def unregistered(config_json: Path) -> Model:
    """Return a model that only its config.json describes, with the folder's name."""
    architecture = architecture_from_config(published_config("", config_json))
    folder = config_json if config_json.is_dir() else config_json.parent
    return Model(key=re.sub(r"\W+", "-", folder.resolve().name).strip("-") or "model", architecture=architecture)


def add(
    hf_id: str, folder: Path, cluster: Cluster, *, config: Path | None = None, name: str | None = None
) -> tuple[str, Path]:
    """Write an entry for a model of Hugging Face into models.yaml of `folder`; return its key and the file.

    Args:
        config: The model's config.json, or the folder it is in; None gets it from Hugging Face.
        name: The key; None makes one of `hf_id`.
    """
    model = entry(hf_id, published_config(hf_id, config), cluster, name)
    edit.add_model(folder / "models.yaml", model.key, _text(model))
    return model.key, folder / "models.yaml"


def _text(model: Model) -> str:
    """Write one entry as the shipped ones are: a key a line, the architecture in braces."""
    keys = {"name", "hf_id", "type", "size_gb", "gpus_required", "context_length", "vllm_args"}
    values = model.model_dump(mode="json", include=keys, exclude_none=True)
    text = yaml.safe_dump({model.key: values}, sort_keys=False)
    known = {key: value for key, value in asdict(model.architecture or Architecture(0, 0, 0, 0)).items() if value}
    numbers = yaml.safe_dump(known, sort_keys=False, default_flow_style=True, width=1000)
    return f"{text}  architecture: {numbers}".rstrip() + "\n"
