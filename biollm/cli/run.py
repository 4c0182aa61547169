"""The command `run`: starts a coding agent that uses the gateway, with a key of its own.

Each agent wants the address, the key and the context length in another way. They are set for its process alone: nothing
of the user's own configuration of the agent is changed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from biollm.cli.complete import LocalOnly
from biollm.errors import UnavailableError, UnknownNameError, UsageError

IDLE = 24 * 3600.0  # seconds without a request until a gateway that `run` started ends: a night, for a waiting agent
LIFETIME = 7 * 24 * 3600  # seconds for which an agent's key is valid
_KEY = "BIOLLM_AGENT_KEY"
_RESTART = "Restart it: `biollm serve stop`, then run this again."
_UNKNOWN = 32_768  # tokens, where no deployment states its context


@dataclass(frozen=True)
class Link:
    """What an agent needs to know of the gateway.

    Attributes:
        url: The gateway's address, without /v1.
        context: Tokens of prompt and answer together.
        folder: A private folder for the agent's configuration.
    """

    url: str
    key: str = field(repr=False)
    model: str
    context: int
    folder: Path


@dataclass(frozen=True)
class Setup:
    """How one agent gets it: variables (None: removed), options before the user's own, and JSON files."""

    env: Mapping[str, str | None]
    options: Sequence[str] = ()
    files: Mapping[Path, Any] = field(default_factory=dict[Path, Any])


def _codex(link: Link) -> Setup:
    provider = {"name": "biollm", "base_url": f"{link.url}/v1", "env_key": _KEY, "wire_api": "responses"}
    values = {"model": link.model, "model_provider": "biollm", "model_context_window": link.context}
    values |= {f"model_providers.biollm.{name}": value for name, value in provider.items()}
    return Setup({_KEY: link.key}, [f"-c{name}={json.dumps(value)}" for name, value in values.items()])


def _claude(link: Link) -> Setup:
    models = ("MODEL", "DEFAULT_FABLE_MODEL", "DEFAULT_HAIKU_MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL")
    return Setup(
        {
            "ANTHROPIC_BASE_URL": link.url,
            "ANTHROPIC_AUTH_TOKEN": link.key,
            "ANTHROPIC_API_KEY": None,
            **{f"ANTHROPIC_{name}": link.model for name in models},
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(link.context),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
    )


def _opencode(link: Link) -> Setup:
    model = {"name": link.model, "limit": {"context": link.context, "output": link.context // 4}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{link.url}/v1", "apiKey": f"{{env:{_KEY}}}"},
        "models": {link.model: model},
    }
    name = f"biollm/{link.model}"
    content = {"provider": {"biollm": provider}, "model": name, "small_model": name}
    return Setup({_KEY: link.key, "OPENCODE_CONFIG_CONTENT": json.dumps(content)})


def _qwen(link: Link) -> Setup:
    file = link.folder / "qwen.json"
    env = {"OPENAI_BASE_URL": f"{link.url}/v1", "OPENAI_API_KEY": link.key, "OPENAI_MODEL": link.model}
    settings = {"model": {"generationConfig": {"contextWindowSize": link.context}}}
    return Setup(
        {**env, "QWEN_CODE_SYSTEM_DEFAULTS_PATH": str(file)},
        ["--auth-type", "openai", "--model", link.model],
        {file: settings},
    )


def _aider(link: Link) -> Setup:
    file, name = link.folder / "aider.json", f"openai/{link.model}"
    facts = {"litellm_provider": "openai", "mode": "chat", "max_input_tokens": link.context}
    return Setup(
        {
            "AIDER_OPENAI_API_BASE": f"{link.url}/v1",
            "AIDER_OPENAI_API_KEY": link.key,
            "AIDER_MODEL": name,
            "AIDER_MODEL_METADATA_FILE": str(file),
            "AIDER_SHOW_MODEL_WARNINGS": "false",
        },
        files={file: {name: facts}},
    )


AGENTS: Mapping[str, tuple[Callable[[Link], Setup], str]] = {  # each with the command that installs it
    "codex": (_codex, "npm install -g @openai/codex"),
    "claude": (_claude, "npm install -g @anthropic-ai/claude-code"),
    "opencode": (_opencode, "npm install -g opencode-ai"),
    "qwen": (_qwen, "npm install -g @qwen-code/qwen-code"),
    "aider": (_aider, "pipx install aider-chat"),
}


def run(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help=f"{', '.join(AGENTS)}.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="-- ARGS", help="For the agent.")] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Model, or provider/model.")] = "biollm",
    local_only: LocalOnly = False,
    policy: Annotated[
        Literal["any", "no_training", "local_only"], typer.Option(help="Data policy of all its requests.")
    ] = "any",
    show: Annotated[bool, typer.Option("--print", help="Print what would be set, and run nothing.")] = False,
) -> None:
    """Run a coding agent with the waterfall behind it.

    Uses the running gateway, or starts one in the background.
    """
    if agent not in AGENTS:
        raise UnknownNameError("agent", agent, AGENTS)
    make, install = AGENTS[agent]
    program = shutil.which(agent)
    if not (program or show):
        raise UnavailableError(f"{agent} is not installed.", hint=f"Install it: {install}.")
    link = _link(agent, model, "local_only" if local_only else policy, start=not show)
    setup = make(link)
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

    url, secret = _gateway(start=start)
    key = derive(secret, Grant(agent, policy, int(time.time()) + LIFETIME))
    facts = remote.model(url, key, model, policy, load_config().cluster) if url else {}
    folder = own_dir(state_dir()) / "agents"
    return Link(url or "http://127.0.0.1:PORT", key, model, facts.get("context_length") or _UNKNOWN, folder)


def _gateway(*, start: bool) -> tuple[str | None, str]:
    """Return the gateway's URL, None if there is none and it was not to be started, and one of its keys."""
    from biollm.client import remote
    from biollm.gateway import auth, server

    if url := remote.named():
        if not (key := os.environ.get("BIOLLM_GATEWAY_KEY")):
            raise UsageError("BIOLLM_GATEWAY_KEY is not set.", hint=f"Set it to a key of the gateway at {url}.")
        return url, key
    if os.environ.get("BIOLLM_GATEWAY"):
        raise UsageError("BIOLLM_GATEWAY=off, and an agent needs the gateway.", hint="Unset BIOLLM_GATEWAY.")
    secret = auth.keys()[0][0].secret
    if folder := remote.nearby():
        if url := (remote.record(folder) or {}).get("url"):
            return url, secret
        raise UsageError("The running gateway has no TCP port, which agents need.", hint=_RESTART)
    if server.running():
        raise UsageError("The running gateway has another configuration, or lacks a key.", hint=_RESTART)
    if not start:
        return None, secret
    return server.detach(["--port", "0", "--idle-timeout", str(IDLE)])[0]["url"], secret


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
