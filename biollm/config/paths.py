"""Where biollm's data, the user's configuration and state, and a site's run directory are; without pydantic."""

from __future__ import annotations

import os
from collections.abc import Container
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from biollm._files import is_shared
from biollm.errors import UsageError

if TYPE_CHECKING:
    from biollm.config.schema import Cluster, Model

_PACKAGE = Path(__file__).parents[1]
# as people write it in files and in the environment
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def data_dir(name: str) -> Path:
    """Return the shipped folder `router_config` or `slurm_templates`: in a wheel under `_data`, else beside the package."""
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"The data folder {name!r} of biollm is missing: install it again.")


def config_dirs() -> list[tuple[str, Path]]:
    """Return the configuration layers in order, as (name, folder); later ones win. The folders may not exist."""
    site = os.environ.get("BIOLLM_SITE_CONFIG") or "/etc/biollm"
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "biollm"
    layers = [("shipped", data_dir("router_config")), ("site", Path(site)), ("user", home)]
    override = os.environ.get("BIOLLM_CONFIG_DIR")
    return [*layers, ("BIOLLM_CONFIG_DIR", Path(override))] if override else layers


def state_dir() -> Path:
    """Return the folder of the ledger, tokens and weights: BIOLLM_STATE_DIR or XDG's state folder."""
    override = os.environ.get("BIOLLM_STATE_DIR")
    return _path(override) if override else _home()


def own_dir(state: Path) -> Path:
    """Return the folder of this user's keys, logins and alerts: `state`, or one in $HOME if a group shares `state`."""
    if not is_shared(state):
        return state
    return _home() if not is_shared(_home()) else _home().with_name("biollm-own")


def _home() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return _path(f"{state}/biollm") if state else _path(f"{os.environ.get('HOME') or Path.home()}/.local/state/biollm")


_path = cache(Path)  # making one takes longer than most of what a request needs


def wants_local_only() -> bool:
    """Return whether BIOLLM_LOCAL_ONLY is set.

    Raises:
        UsageError: It is neither yes nor no.
    """
    return _variable("BIOLLM_LOCAL_ONLY", (*TRUE, *FALSE), "1 or 0") in TRUE


def refuses_degraded() -> bool:
    """Return whether BIOLLM_NO_DEGRADED is set: the embedded model may not answer.

    Raises:
        UsageError: It is neither yes nor no.
    """
    return _variable("BIOLLM_NO_DEGRADED", (*TRUE, *FALSE), "1 or 0") in TRUE


def wanted_sender() -> Literal["litellm", "direct"] | None:
    """Return the sender that BIOLLM_SENDER names, or None.

    Raises:
        UsageError: There is no such sender.
    """
    name = _variable("BIOLLM_SENDER", ("litellm", "direct"), "litellm or direct")
    return cast("Literal['litellm', 'direct']", name) if name else None


def _variable(name: str, choices: Container[str], needs: str) -> str:
    """Return the value of a variable in small letters, "" where it is not set."""
    value = os.environ.get(name, "")
    if value and value.lower() not in choices:
        raise UsageError(f"{name} is {value!r}; it must be {needs}.")
    return value.lower()


def environment_tags() -> dict[str, str]:
    """Return the tags in BIOLLM_TAGS.

    Raises:
        UsageError: One is not key=value.
    """
    return tags_of(os.environ.get("BIOLLM_TAGS", ""), "BIOLLM_TAGS")


def tags_of(written: str, name: str) -> dict[str, str]:
    """Return the tags of "agent=ErrorDiagnosis,user=ann", which `name` holds.

    Raises:
        UsageError: One is not key=value.
    """
    tags: dict[str, str] = {}
    for part in filter(None, map(str.strip, written.split(","))):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not (key and equals):
            raise UsageError(
                f"{name} has {part!r}, which is not key=value.", hint="Write agent=ErrorDiagnosis,user=ann."
            )
        tags[key] = value
    return tags


def run_dir(cluster: Cluster) -> Path:
    """Return the run directory, which the nodes share; the user may keep other things there, too."""
    return cluster.run_dir or own_dir(state_dir()) / "slurm"


def biollm_dir(cluster: Cluster) -> Path:
    """Return the folder in the run directory with the records of servers and submissions."""
    return run_dir(cluster) / "biollm"


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
    """Return the folder for a model's weights: its `path`, or models_dir/ORG/NAME[@REVISION]."""
    if model.path:
        return model.path
    if model.type != "local" or not model.hf_id:
        raise UsageError(f"{model.key} is not a local model: it needs `type: local`, and an hf_id or a path.")
    suffix = f"@{model.revision.replace('/', '_')}" if model.revision else ""
    return models_dir(cluster) / f"{model.hf_id}{suffix}"
