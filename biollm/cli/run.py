"""The command `run`: starts a coding agent on the gateway, with a key of its own.

Nothing of the user's own configuration of the agent is changed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from typing import Annotated, Literal
from urllib.parse import urlsplit

from typer import Argument, Option

from biollm.cli.agents import AGENTS, Link, Setup
from biollm.cli.complete import LocalOnly
from biollm.cli.output import Progress
from biollm.errors import UnavailableError, UnknownNameError, UsageError
from biollm.types import DATA_POLICIES

IDLE = 24 * 3600.0  # seconds without a request until a gateway that `run` started ends: a night, for a waiting agent
LIFETIME = 7 * 24 * 3600  # seconds for which an agent's key is valid
_RESTART = "Restart it: `biollm serve stop`, then run this again."
_UNKNOWN = 32_768  # tokens, where no deployment states its context


def run(
    agent: Annotated[str, Argument(metavar="AGENT", help=f"{', '.join(AGENTS)}.")],
    arguments: Annotated[list[str] | None, Argument(metavar="-- ARGS", help="For the agent.")] = None,
    model: Annotated[str, Option(metavar="NAME", help="Model, or provider/model.")] = "biollm",
    local_only: LocalOnly = False,
    policy: Annotated[
        Literal["any", "no_training", "local_only"], Option(help="Data policy of all its requests.")
    ] = "any",
    show: Annotated[bool, Option("--print", help="Print what would be set, and run nothing.")] = False,
) -> None:
    """Run a coding agent with the waterfall behind it.

    Uses the running gateway, or starts one in the background.
    """
    if agent not in AGENTS:
        raise UnknownNameError("agent", agent, AGENTS)
    set_up, install = AGENTS[agent]
    if not (program := shutil.which(agent)) and not show:
        raise UnavailableError(f"{agent} is not installed.", hint=f"Install it: {install}.")
    link = _link(agent, model, "local_only" if local_only else policy, start=not show)
    setup = set_up(link)
    command = [agent, *setup.options, *(arguments or [])]
    if show:
        _print(setup, command, link.key)
        return
    from biollm._files import write_private

    for file, content in setup.files.items():
        write_private(file, json.dumps(content, indent=2))
    os.execve(program or agent, command, _environment(setup, link.url))  # noqa: S606


def _link(agent: str, model: str, policy: str, *, start: bool) -> Link:
    """Return the way to the gateway, which is asked for the model's context length."""
    from biollm.client import remote
    from biollm.config import load_config
    from biollm.config.paths import own_dir, state_dir
    from biollm.providers.gateway_key import Grant, derive
    from biollm.routing.candidates import address, check_names

    config = load_config()
    policy = max(policy, config.data_policy, key=DATA_POLICIES.index)  # this process may have BIOLLM_LOCAL_ONLY
    url, secret = _gateway(start=start)
    key = derive(secret, Grant(agent, policy, int(time.time()) + LIFETIME))
    if not url:
        check_names(config, *map(address(config, model).get, ("provider", "model")))
    facts = remote.model(url, key, model, policy, config.cluster) if url else {}
    folder = own_dir(state_dir()) / "agents"
    return Link(url or "http://127.0.0.1:PORT", key, model, facts.get("context_length") or _UNKNOWN, folder)


def _gateway(*, start: bool) -> tuple[str | None, str]:
    """Return the gateway's URL, None if there is none and it was not to be started, and one of its keys."""
    from biollm.client import remote
    from biollm.gateway import server

    if url := remote.named():
        if not (key := os.environ.get("BIOLLM_GATEWAY_KEY")):
            raise UsageError("BIOLLM_GATEWAY_KEY is not set.", hint=f"Set it to a key of the gateway at {url}.")
        return url, key
    if os.environ.get("BIOLLM_GATEWAY"):
        raise UsageError("BIOLLM_GATEWAY=off, and an agent needs the gateway.", hint="Unset BIOLLM_GATEWAY.")
    secret = next(each.secret for each in server.module("keys").keys()[0] if each.secret)
    if folder := remote.nearby():
        if url := (remote.record(folder) or {}).get("url"):
            return url, secret
        raise UsageError("The running gateway has no TCP port, which agents need.", hint=_RESTART)
    if server.running():
        raise UsageError("The running gateway has another configuration, or lacks a key.", hint=_RESTART)
    if not start:
        return None, secret
    progress = Progress()
    progress.say("starting the gateway")
    record, _ = server.detach(["--port", "0", "--idle-timeout", str(IDLE)])
    progress.clear()
    return record["url"], secret


def _environment(setup: Setup, url: str) -> dict[str, str]:
    """Return the agent's environment. No proxy can reach this machine's loopback."""
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), urlsplit(url).hostname)))
    env = {**os.environ, "NO_PROXY": direct, "no_proxy": direct, **setup.env}
    return {name: value for name, value in env.items() if value is not None}


def _print(setup: Setup, command: Sequence[str], key: str) -> None:
    for name, value in setup.env.items():
        print(f"unset {name}" if value is None else f"export {name}={shlex.quote(value.replace(key, '***'))}")
    for file, content in setup.files.items():
        print(f"# {file}: {json.dumps(content)}")
    print(shlex.join(command))
