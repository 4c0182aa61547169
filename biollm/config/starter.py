"""Writes a commented configuration for a new user, and tells which keys are there already."""

from __future__ import annotations

import os
from pathlib import Path

from biollm.config import load_config

_HEAD = """\
# biollm's {name}.yaml: what you write here changes the shipped defaults, key by key (`biollm config` shows the result).
# Every key: `biollm config --schema {name}`.
"""
_FILES = {
    "models": """\
models:
  # deepseek-coder-v2: {enabled: false}                    # take an entry out
  # qwen-coder-32b: {vllm_args: {max_model_len: 16384}}    # change one value
  # my-model: {hf_id: org/My-Model, gpus_required: 1}      # add one; `biollm models add` writes its architecture too
""",
    "providers": """\
# data_policy: no_training    # or local_only: nothing ever leaves the cluster
providers:
  # lightning: {rate_limit: 20/min}    # change one value
  # gemini: {enabled: false}           # take an entry out
  # openai: {budget: 25 USD/month}
  # groq:                              # add one; its key stays in the environment, or in a 0600 file (key_file)
  #   {type: api, priority: 2, env_key: GROQ_API_KEY, models: [openai/gpt-oss-120b], rate_limit: [30/min, 1000/day]}
""",
    "cluster": """\
cluster:
  # partition: gpu
  # account: my-project
  # gpu_type: a100        # with gpu_memory_gib, gpus_per_node, exclusive
  # walltime: "8:00:00"
  # environment: {modules: [cuda/12.8], venv: ~/envs/vllm}
  # models_dir: /scratch/my-lab/models
""",
}


def write_starter(directory: Path) -> list[str]:
    """Write models.yaml, providers.yaml and cluster.yaml, each only where none is; return what was done.

    One line per file, then one per key that a shipped provider would use: its name, never its value.

    Raises:
        OSError: The folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done: list[str] = []
    for name, text in _FILES.items():
        path = directory / f"{name}.yaml"
        try:
            with path.open("x") as file:
                file.write(_HEAD.format(name=name) + text)
            done.append(f"wrote {path}")
        except FileExistsError:
            done.append(f"kept {path}, which exists already")
    accounts = [account for provider in load_config(directory).providers for account in provider.accounts]
    keys = dict.fromkeys(account.env_key for account in accounts if account.env_key)
    return done + [f"found {key}" if os.environ.get(key) else f"{key} is not set" for key in keys]
