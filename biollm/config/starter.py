"""Writes a commented configuration for a new user, and lists the keys that are set already."""

from __future__ import annotations

import os
from pathlib import Path

from biollm.config import load_config
from biollm.config.merge import FILES
from biollm.config.paths import data_dir


def write_starter(directory: Path) -> list[str]:
    """Write models.yaml, providers.yaml and cluster.yaml, without overwriting any; return what was done.

    One line per file, then one per key that a shipped provider would use: its name, never its value.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done: list[str] = []
    for name in FILES:
        path = directory / f"{name}.yaml"
        try:
            with path.open("x") as file:
                file.write((data_dir("router_config") / "starter" / path.name).read_text())
            done.append(f"wrote {path}")
        except FileExistsError:
            done.append(f"kept {path}, which exists already")
    accounts = [account for provider in load_config(directory).providers for account in provider.accounts]
    keys = dict.fromkeys(account.env_key for account in accounts if account.env_key)
    return done + [f"found {key}" if os.environ.get(key) else f"{key} is not set" for key in keys]
