"""Checks one by one what a newcomer trips over; each answer comes with its mend. Sends no prompt."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

from biollm import slurm
from biollm._files import is_shared
from biollm._ownership import address, is_this_host
from biollm.config import Config
from biollm.config.paths import own_dir, run_dir, state_dir
from biollm.errors import BiollmError
from biollm.ledger.sqlite import on_network
from biollm.providers import credentials
from biollm.slurm import commands, weights

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found and, where it is not ok, how to mend it."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


def check(config: Config) -> list[Check]:
    """Return every check, in the order in which a newcomer meets them. Takes seconds where Slurm does not answer."""
    checks: list[Callable[[Config], Check]] = [_state, _keys, _proxy, _weights, _environment, _run_dir, _commands]
    found = [each(config) for each in checks]
    return [*found, _partition(config)] if found[-1].ok else found


def _state(config: Config) -> Check:
    folder = state_dir()
    if not folder.is_dir():
        return Check("state folder", True, f"{folder} is made by the first request, for you alone")
    at, own = folder.stat(), own_dir(folder)
    if not is_shared(folder):
        if at.st_mode & stat.S_IWGRP:
            detail = f"{folder} is its group's to write, but has no setgid bit: members shut each other out"
            return Check("state folder", False, detail, f"chmod g+s {quote(str(folder))}, or chmod 700")
        return Check("state folder", True, f"{folder} is yours alone")
    closed = [path.name for path in folder.glob("*.db*") if not path.stat().st_mode & stat.S_IWGRP]
    if closed:
        detail = f"{folder} is a group's, but {closed[0]} is closed to the group"
        return Check(
            "state folder", False, detail, f"chmod g+rw {quote(str(folder))}/*.db* {quote(str(folder))}/*.lock"
        )
    shared = "limits, cooldowns, usage and the embedded model's weights are shared"
    return Check("state folder", True, f"{folder}: {shared}; logins, gateway key and alerts are yours, in {own}")


def _keys(config: Config) -> Check:
    there: list[str] = []
    lacking: list[str] = []
    for provider in config.providers:
        for account in provider.accounts if provider.type == "api" else ():
            name = provider.name if account.name == "default" else f"{provider.name}.{account.name}"
            key = credentials.find(provider, account, state_dir(), exchange=False)
            (lacking if isinstance(key, str) else there).append(key if isinstance(key, str) else name)
    detail = f"found for {', '.join(there) or 'no provider'}"
    return Check("keys", bool(there) or not lacking, f"{detail}; {len(lacking)} lack one", "; ".join(lacking))


def _proxy(config: Config) -> Check:
    names = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return Check("proxy", True, "none is set: providers are asked directly")
    written = os.environ[name]
    url = written if "://" in written else f"http://{written}"  # httpx takes either
    host = urlsplit(url).hostname
    with suppress(OSError, ValueError), socket.create_connection(address(url), timeout=3):
        return Check("proxy", True, f"{name} is set, and {host} answers")
    return Check("proxy", False, f"{name} is set, but {host} does not answer", f"Correct or unset {name}.")


def _weights(config: Config) -> Check:
    local = [model for model in config.models.values() if model.type == "local" and (model.hf_id or model.path)]
    found = {model.key: weights.present(model, config.cluster) for model in local}
    there = [key for key, where in found.items() if isinstance(where, Path)]
    lacking = next((where for where in found.values() if isinstance(where, str)), "")
    detail = f"of {len(found)} local models, the weights of {', '.join(there) or 'none'} are here"
    return Check("weights", bool(there), detail, lacking or "Add a local model: `biollm models add`.")


def _environment(config: Config) -> Check:
    for problem in slurm.missing([], config.cluster):
        return Check("serving environment", False, str(problem), problem.hint or "")
    site = config.cluster.environment
    where = site.container or site.venv or site.conda or (site.modules and f"modules {', '.join(site.modules)}")
    if where or shutil.which("vllm"):
        return Check("serving environment", True, f"vLLM comes from {where or 'PATH'}")
    return Check("serving environment", False, "nothing provides vLLM", "Set `environment` in cluster.yaml: venv, ...")


def _run_dir(config: Config) -> Check:
    folder = run_dir(config.cluster)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Check("run directory", False, f"{there} cannot be written", "Set `run_dir` in cluster.yaml.")
    detail = f"{folder} is on {'a network' if on_network(there) else 'a local'} file system"
    if on_network(there) or not shutil.which("scontrol") or _all_here():
        return Check("run directory", True, detail)
    return Check("run directory", False, f"{detail}, which the nodes may not see", "Set `run_dir` to a shared folder.")


def _all_here() -> bool:
    """Is every node of the cluster this very host?"""
    with suppress(BiollmError):
        return all(map(is_this_host, commands.nodes().values()))
    return True


def _commands(config: Config) -> Check:
    lacking = [command for command in _COMMANDS if not shutil.which(command)]
    if lacking:
        return Check(
            "slurm", False, f"no {', '.join(lacking)} here", "Run this on a login node; cloud rungs need none."
        )
    return Check("slurm", True, f"{', '.join(_COMMANDS)} are here")


def _partition(config: Config) -> Check:
    site = config.cluster
    asked = f"partition {site.partition or '(default)'}, account {site.account or '(default)'}"
    try:
        slurm.try_one_gpu(site)
    except BiollmError as error:
        return Check("submission", False, str(error), error.hint or "")
    return Check("submission", True, f"Slurm would take a job of one GPU ({asked})")
