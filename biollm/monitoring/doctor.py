"""Setup checks; each failed one suggests a fix. Sends no prompt."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

from biollm import slurm
from biollm._files import is_shared
from biollm._ownership import address, is_this_host
from biollm.config import Config
from biollm.config.paths import data_dir, own_dir, run_dir, state_dir
from biollm.errors import BiollmError, UnavailableError
from biollm.ledger import redis
from biollm.ledger.sqlite import locks_are_local, on_network
from biollm.providers import credentials
from biollm.slurm import commands, vllm_flags, weights

_OLDEST, _SLOW, _CLOCK = 5, 100.0, 60.0  # of a Redis server: major version; ms for an answer; seconds its clock is off
_NO_EVICTION = "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf"
_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")
_Result = tuple[bool, str, str]  # whether it is ok, what was found, how to fix it


@dataclass(frozen=True)
class Check:
    """One check: what was found and, if it is not ok, how to fix it."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def check(config: Config) -> list[Check]:
    """Return every check, in the order of a setup. Takes seconds if Slurm does not answer."""
    checks: dict[str, Callable[[Config], _Result]] = {
        "state folder": _state,
        "keys": _keys,
        "proxy": _proxy,
    }
    if config.ledger.url:
        checks["ledger"] = _ledger
    if not _wants_cluster(config):
        left_out = "no Slurm and no site of yours: the checks for local models on a cluster are left out"
        return [*(Check(name, *run(config)) for name, run in checks.items()), Check("cluster", True, left_out)]
    checks |= {"weights": _weights, "serving environment": _environment, "run directory": _run_dir, "slurm": _commands}
    found = [Check(name, *run(config)) for name, run in checks.items()]
    return [*found, Check("submission", *_submission(config))] if found[-1].ok else found


def _wants_cluster(config: Config) -> bool:
    """Return whether this is a cluster, or the user describes one or a model for one."""
    shipped = str(data_dir("router_config"))
    own = [key.split(".") for key, at in config.sources.items() if not at.startswith(shipped)]
    local = {key for key, model in config.models.items() if model.type == "local"}
    described = any(kind == "cluster" or (kind == "models" and rest[0] in local) for kind, *rest in own)
    return described or any(map(shutil.which, _COMMANDS))


def _state(config: Config) -> _Result:
    folder = state_dir()
    present = next(path for path in (folder, *folder.parents) if path.exists())
    if not folder.is_absolute():
        return (
            False,
            f"{folder} is a relative path: each working directory has its own",
            "Make BIOLLM_STATE_DIR absolute.",
        )
    if not (present.is_dir() and os.access(present, os.W_OK | os.X_OK)):
        detail = f"{folder} cannot be used: {present} is {'not writable' if present.is_dir() else 'not a folder'}"
        return False, detail, "Set BIOLLM_STATE_DIR to a folder of yours, or unset it."
    if not folder.is_dir():
        return True, f"{folder} will be created by the first request, readable by you alone", ""
    if locks_are_local(folder) and not config.ledger.url:
        detail = f"{folder} is on a file system that passes no locks to other hosts, so limits hold for each host alone"
        return True, f"{detail}; `ledger: {{url: redis://...}}` in providers.yaml shares them", ""
    if not is_shared(folder):
        if folder.stat().st_mode & stat.S_IWGRP:
            detail = f"{folder} is writable by its group but has no setgid bit: members lock each other out"
            return False, detail, f"chmod g+s {quote(str(folder))}, or chmod 700"
        return True, f"{folder} is yours alone", ""
    closed = [path.name for path in folder.glob("*.db*") if not path.stat().st_mode & stat.S_IWGRP]
    if closed:
        files = f"{quote(str(folder))}/*.db* {quote(str(folder))}/*.lock"
        return False, f"{folder} is shared by a group, but {closed[0]} is closed to the group", f"chmod g+rw {files}"
    shared = "limits, cooldowns, usage and the embedded model's weights are shared"
    return True, f"{folder}: {shared}; logins, gateway key and alerts are yours, in {own_dir(folder)}", ""


def _keys(config: Config) -> _Result:
    present: list[str] = []
    missing: list[str] = []
    for provider in config.providers:
        for account in provider.accounts if provider.type == "api" else ():
            name = provider.name if account.name == "default" else f"{provider.name}.{account.name}"
            key = credentials.find(provider, account, state_dir(), exchange=False)
            (missing if isinstance(key, str) else present).append(key if isinstance(key, str) else name)
    detail = f"found for {', '.join(present) or 'no provider'}; {len(missing)} missing"
    if loops := credentials.loops(config, state_dir()):
        return False, detail, str(loops[0])
    return bool(present) or not missing, detail, "; ".join(missing)


def _proxy(config: Config) -> _Result:
    names = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return True, "none is set: providers are reached directly", ""
    written = os.environ[name]
    url = written if "://" in written else f"http://{written}"  # httpx takes either
    host = urlsplit(url).hostname
    with suppress(OSError, ValueError), socket.create_connection(address(url), timeout=3):
        return True, f"{name} is set, and {host} answers", ""
    return False, f"{name} is set, but {host} does not answer", f"Correct or unset {name}."


def _ledger(config: Config) -> _Result:
    url = config.ledger.url
    try:
        server = redis.examine(config.ledger)
    except UnavailableError as error:
        return False, str(error), error.hint or ""
    except OSError as error:
        return False, f"{url} cannot be used: {error}", "Start it, or correct `ledger:` in providers.yaml."
    detail = f"{url}: {server.product}, answers in {server.ms:.1f} ms, its clock is {abs(server.ahead):.1f} s off this host's"
    if server.replica:
        return False, f"{url} is a read-only replica", "Write the primary's address into `ledger:`."
    if server.cluster:
        return False, f"{url} is a node of a Redis cluster, which keeps only some keys", "Use a server of its own."
    if server.major < _OLDEST:
        return False, detail, f"Install Redis {_OLDEST} or later, or Valkey."
    if server.evicts:
        return False, f"{detail}; it forgets counts when its memory is full ({server.evicts})", _NO_EVICTION
    if server.ms > _SLOW:
        return False, f"{detail}; every request waits for it", "Use a server nearer to the hosts."
    if abs(server.ahead) > _CLOCK:
        return False, f"{detail}; days and months begin by the server's", "Let both hosts get their time by NTP."
    return True, detail, ""


def _weights(config: Config) -> _Result:
    local = [model for model in config.models.values() if model.type == "local" and (model.hf_id or model.path)]
    found = {model.key: weights.present(model, config.cluster) for model in local}
    present = [key for key, where in found.items() if isinstance(where, Path)]
    fix = next((where for where in found.values() if isinstance(where, str)), "Add a local model: `biollm models add`.")
    return bool(present), f"present for {', '.join(present) or 'none'} of {len(found)} local models", fix


def _environment(config: Config) -> _Result:
    for problem in slurm.missing([], config.cluster):
        return False, str(problem), problem.hint or ""
    site = config.cluster.environment
    where = site.container or site.venv or site.conda or (site.modules and f"modules {', '.join(site.modules)}")
    on_path = shutil.which("vllm")
    if not (where or on_path):
        return False, "nothing provides vLLM", "Set `environment` in cluster.yaml: venv, ..."
    prefix = site.venv or site.conda or (Path(on_path or "").resolve().parents[1] if not where else None)
    version = _vllm(Path(prefix)) if prefix else ""
    detail = f"vLLM {version} comes from {where or prefix}" if version else f"vLLM comes from {where or 'PATH'}"
    if version and vllm_flags.minor(version) != (checked := vllm_flags.minor(vllm_flags.snapshot()["vllm"])):
        detail += f", and vllm_args are checked against the flags of {checked}"
        return False, detail, f"{quote(f'{prefix}/bin/pip')} install {quote(vllm_flags.requirement())}"
    return True, detail, ""


def _vllm(prefix: Path) -> str:
    """Return the version of vLLM in an environment, without importing it; "" where that is not known."""
    folders = prefix.glob("lib/python3*/site-packages") if prefix.is_absolute() else ()  # else a name of conda's
    return next((each.version for each in distributions(name="vllm", path=[str(each) for each in folders])), "")


def _run_dir(config: Config) -> _Result:
    folder = run_dir(config.cluster)
    present = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(present, os.W_OK):
        return False, f"{present} is not writable", "Set `run_dir` in cluster.yaml."
    network = on_network(present)
    detail = f"{folder} is on a {'network' if network else 'local'} file system"
    if locks_are_local(present):
        detail += " that passes no locks to other hosts: two of them may start the same server twice"
    if network or not shutil.which("scontrol") or _single_host():
        return True, detail, ""
    return False, f"{detail}, which the nodes may not see", "Set `run_dir` to a shared folder."


def _single_host() -> bool:
    with suppress(BiollmError):
        return all(map(is_this_host, commands.nodes().values()))
    return True


def _commands(config: Config) -> _Result:
    if missing := [command for command in _COMMANDS if not shutil.which(command)]:
        return False, f"{', '.join(missing)} not found", "Run this on a login node; cloud providers need no Slurm."
    return True, f"{', '.join(_COMMANDS)} found", ""


def _submission(config: Config) -> _Result:
    site = config.cluster
    try:
        slurm.try_one_gpu(site)
    except BiollmError as error:
        return False, str(error), error.hint or ""
    names = f"partition {site.partition or '(default)'}, account {site.account or '(default)'}"
    return True, f"Slurm would accept a job with one GPU ({names})", ""
