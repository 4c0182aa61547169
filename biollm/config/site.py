"""Where a site keeps things: run directory, logs, caches and weights. Pure."""

from __future__ import annotations

from pathlib import Path

from biollm._ownership import is_private
from biollm.config import Cluster, Model
from biollm.config.paths import own_dir as own_state
from biollm.config.paths import state_dir
from biollm.errors import UsageError


def run_dir(cluster: Cluster) -> Path:
    """Return the folder on the shared file system where servers leave their records."""
    if cluster.run_dir:
        return cluster.run_dir
    before = state_dir() / "slurm"  # of version 0.1, in a folder that a group shares, too
    return before if is_private(before) else own_state(state_dir()) / "slurm"


def own_dir(cluster: Cluster) -> Path:
    """Return biollm's own folder in the run directory, which may be the user's for other things, too."""
    return run_dir(cluster) / "biollm"


def places(cluster: Cluster) -> tuple[Path, Path]:
    """Return where biollm's own files lie: this version's, and where 0.1 put them, whose servers may still run."""
    return own_dir(cluster), run_dir(cluster)


def present_dir(cluster: Cluster) -> Path:
    """Return the first of `places` that is there, for who only looks and makes no folder."""
    return next((place for place in places(cluster) if place.is_dir()), own_dir(cluster))


def log_dir(cluster: Cluster) -> Path:
    """Return the folder of the jobs' and servers' logs."""
    return cluster.log_dir or run_dir(cluster) / "logs"


def cache_dir(cluster: Cluster) -> Path:
    """Return the folder of caches that must not fill $HOME."""
    return cluster.cache_dir or run_dir(cluster) / "cache"


def models_dir(cluster: Cluster) -> Path:
    """Return the shared folder of the weights."""
    return cluster.models_dir or run_dir(cluster) / "models"


def weights_dir(model: Model, cluster: Cluster) -> Path:
    """Return where a model's weights are, or are to be: its `path`, or models_dir/ORG/NAME[@REVISION].

    Raises:
        UsageError: It is no local model with weights on Hugging Face or in a folder.
    """
    if model.path:
        return model.path
    if model.type != "local" or not model.hf_id:
        raise UsageError(f"{model.key} is no local model: it needs `type: local`, and an hf_id or a path.")
    suffix = f"@{model.revision.replace('/', '_')}" if model.revision else ""
    return models_dir(cluster) / f"{model.hf_id}{suffix}"
