"""Finds the data folders that ship with biollm, and the folders of the user."""

from __future__ import annotations

import os
from pathlib import Path

from biollm._files import is_shared

_PACKAGE = Path(__file__).parents[1]

FALSE = ("false", "no", "off", "0")  # as people write it in files and in the environment


def data_dir(name: str) -> Path:
    """Return the shipped folder `router_config` or `slurm_templates`.

    A wheel holds it under `biollm/_data`; a checkout (or an editable install) beside the package.
    """
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"The data folder {name!r} of biollm is missing: install it again.")


def config_dirs() -> list[tuple[str, Path]]:
    """Return the configuration layers in order, as (name, folder); later ones win. The folders may not exist."""
    site = os.environ.get("BIOLLM_SITE_CONFIG") or "/etc/biollm"
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "biollm"
    layers = [("shipped", data_dir("router_config")), ("site", Path(site)), ("user", home)]
    if override := os.environ.get("BIOLLM_CONFIG_DIR"):
        layers.append(("BIOLLM_CONFIG_DIR", Path(override)))
    return layers


def state_dir() -> Path:
    """Return the folder of the ledger, tokens and weights: BIOLLM_STATE_DIR or XDG's state folder."""
    override = os.environ.get("BIOLLM_STATE_DIR")
    return Path(override) if override else _home()


def own_dir(state: Path) -> Path:
    """Return where this user's keys, logins and alerts go: `state`, or a folder at home where a group shares that."""
    if not is_shared(state):
        return state
    return _home() if not is_shared(_home()) else _home().with_name("biollm-own")


def _home() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "biollm"


def wants_local_only() -> bool:
    """Does BIOLLM_LOCAL_ONLY say so?"""
    return os.environ.get("BIOLLM_LOCAL_ONLY", "").lower() not in ("", *FALSE)


def environment_tags() -> dict[str, str]:
    """Return the tags that BIOLLM_TAGS holds."""
    return tags_of(os.environ.get("BIOLLM_TAGS", ""))


def tags_of(written: str) -> dict[str, str]:
    """Return the tags of "agent=ErrorDiagnosis,user=ann"."""
    pairs = (part.partition("=") for part in written.split(",") if "=" in part)
    return {key.strip(): value.strip() for key, _, value in pairs}
