"""The commands `models`, `providers`, `health`, `config` and `init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from biollm.cli import output
from biollm.cli.output import Json
from biollm.errors import Problem
from biollm.types import counted, iso, short

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from biollm.config import Config, Limit
    from biollm.routing.candidates import Candidate


def models_list(context: typer.Context, as_json: Json = False) -> None:
    """List models in waterfall order."""
    if context.invoked_subcommand:
        return
    from biollm.config import load_config
    from biollm.routing import deployments

    settings = load_config()
    facts = [_model(settings, each) for each in {d.order: d for d in deployments.build_deployments(settings)}.values()]
    if as_json:
        output.as_json(facts)
        return
    rows = [
        (f["order"], f["model"], f["provider"], f["type"], f["context_length"] or "?", ", ".join(f["capabilities"] or "?"))
        for f in facts
    ]  # fmt: skip
    output.table(("#", "model", "provider", "type", "context", "capabilities"), rows)


def _model(settings: Config, deployment: Any) -> dict[str, Any]:
    known = settings.models.get(deployment.model)
    return {
        "order": deployment.order,
        "model": deployment.model,
        "provider": deployment.provider.name,
        "type": deployment.provider.type,
        "id": deployment.litellm_model.split("/", 1)[-1],
        "context_length": deployment.context_length,
        "capabilities": sorted(deployment.capabilities) if deployment.capabilities else None,
        "hf_id": known.hf_id if known else None,
    }


def providers(as_json: Json = False) -> None:
    """List providers and accounts with their limits and usage.

    Sends nothing.
    """
    from biollm.client import Client
    from biollm.config.paths import state_dir

    output.warn_unwritable(state_dir())
    seen: dict[str, dict[str, Any]] = {}
    client = Client(allow_degraded=True, sender="direct")
    for candidate in client.explain():
        fact = _account(candidate, client.used(candidate.deployment))
        name = f"{fact['provider']}/{fact['account']}"
        if name not in seen or (seen[name]["standing"] != "ready" and fact["standing"] == "ready"):
            seen[name] = fact
    if as_json:
        output.as_json(list(seen.values()))
        return
    rows: list[tuple[Any, ...]] = []
    keyless = [name for name, fact in seen.items() if fact["standing"] == "keyless"]
    for name, f in seen.items():
        if name in keyless and sys.stdout.isatty():
            continue
        limits = ", ".join(f"{short(each['used'])} of {each['limit']}" for each in f["limits"]) or "-"
        rows.append((f["priority"], name, f["type"], f["standing"], limits, f["reason"]))
    output.table(("priority", "provider/account", "type", "status", "limits", "reason"), rows)
    _sum_up(keyless, {name: fact["reason"] for name, fact in seen.items()})


def _sum_up(keyless: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Print one line for the accounts without a key, which would fill a terminal."""
    if keyless and sys.stdout.isatty():
        wanted = [f"{name.removesuffix('/default')} ({reasons[name].removeprefix('no key: set ')})" for name in keyless]
        text = f"Without a key: {', '.join(wanted)}."
        print()
        output.paragraph(text)


def _account(candidate: Candidate, used: Sequence[tuple[Limit, float, float | None]]) -> dict[str, Any]:
    deployment = candidate.deployment
    return {
        "priority": deployment.provider.priority,
        "provider": deployment.provider.name,
        "account": deployment.account.name,
        "type": deployment.provider.type,
        "standing": candidate.status,
        "free": deployment.free,
        "limits": [_limit(*each) for each in used],
        "reason": candidate.reason,
    }


def _limit(limit: Limit, used: float, resets: float | None) -> dict[str, Any]:
    facts = {"limit": str(limit), "kind": limit.kind, "amount": limit.amount, "per": limit.unit}
    return {**facts, "used": used, "resets": iso(resets)}


def health(
    timeout: Annotated[float, Option(min=0.1, metavar="SECONDS", help="Timeout for all checks together.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Check the availability of all providers.

    Lists their models, in parallel, which costs no tokens. Exit 69 when none is available.
    """
    from biollm.config import load_config
    from biollm.routing import health as checks

    progress = output.Progress(quiet=as_json)
    progress.say("checking all providers")
    found = checks.check(load_config(), timeout=timeout)
    progress.clear()
    if as_json:
        output.as_json(found)
    else:
        keyless = [each.who for each in found if each.keyless]
        said = {True: "up", False: "down", None: "unknown"}
        rows = [
            (
                each.who,
                "keyless" if each.keyless else said[each.available],
                "-" if each.latency_ms is None else f"{each.latency_ms:.0f}",
                _why(each),
            )
            for each in found
            if not (each.keyless and sys.stdout.isatty())
        ]
        output.table(("provider", "status", "ms", "remarks"), rows)
        _sum_up(keyless, {each.who: each.error for each in found})
    if not any(each.available is not False for each in found):  # one that could not be asked may be there
        raise typer.Exit(69)


def _why(health: Any) -> str:
    missing = f"does not list: {', '.join(health.missing)}" if health.missing else ""
    return "; ".join(filter(None, (health.error or missing, health.resting)))


def config(
    check: Annotated[
        bool,
        Option(
            "--check",
            help="Validate (exit 78 if invalid); warn about deprecated models, prices and training policies.",
        ),
    ] = False,
    litellm: Annotated[bool, Option("--litellm", help="Print it as a config.yaml for the LiteLLM proxy.")] = False,
    schema: Annotated[
        Literal["models", "providers", "cluster"] | None,
        Option(metavar="NAME", help="Print the JSON Schema of models, providers or cluster."),
    ] = None,
    lenient: Annotated[bool, Option("--lenient", help="Treat unknown keys as warnings.")] = False,
    as_json: Json = False,
) -> None:
    """Show the configuration and its sources."""
    from biollm import config as configuration
    from biollm.config.paths import config_dirs, data_dir

    if schema:
        output.as_json(configuration.json_schema(schema))
        return
    settings = configuration.load_config(lenient=lenient)
    warnings = [*settings.warnings, *(_registry(settings) if check else ())]
    shipped = f"{data_dir('router_config')}/"
    for warning in warnings:
        typer.echo(f"warning: {str(warning).replace(shipped, 'shipped ')}", err=True)
    if any(warning.file.startswith(shipped) for warning in warnings):
        folder = config_dirs()[-1][1]
        typer.echo(f"To change a shipped entry, write the keys that differ into a file in {folder}.", err=True)
    if check and as_json:
        output.as_json({"providers": len(settings.providers), "models": len(settings.models), "warnings": warnings})
    elif check:
        print(
            f"Configuration OK: {counted(len(settings.providers), 'provider')}, {counted(len(settings.models), 'model')}."
        )
    elif litellm:
        _litellm(settings)
    elif as_json:
        output.as_json({"values": settings, "sources": settings.sources})
    else:
        output.table(
            ("key", "value", "from"),
            [(key, value, output.short_path(at)) for key, value, at in configuration.describe(settings)],
        )


def _registry(settings: Config) -> list[Problem]:
    from datetime import UTC, datetime
    from importlib.metadata import version

    from biollm.config.paths import state_dir
    from biollm.monitoring import delivery
    from biollm.providers import credentials
    from biollm.routing import config_check, litellm_private, pricing

    source = f"litellm {version('litellm')}'s {litellm_private.PRICES}"
    found = config_check.check(settings, datetime.now(UTC).date(), pricing.price_map(), source)
    keys = [*credentials.loops(settings, state_dir()), *credentials.unreadable(settings)]
    return [*found, *delivery.unready(settings), *keys]


def _litellm(settings: Config) -> None:
    import yaml

    from biollm.routing import router_config

    made, left_out = router_config.proxy_config(settings)
    for sentence in left_out:
        print(f"# left out: {sentence}")
    print(yaml.safe_dump(made, sort_keys=False), end="")


def init(
    directory: Annotated[
        Path | None, Argument(metavar="DIRECTORY", help="Folder to write to; default: your configuration folder.")
    ] = None,
) -> None:
    """Write a commented starter configuration.

    Lists the API keys it finds. Existing files are kept.
    """
    from biollm.config.paths import config_dirs
    from biollm.config.starter import write_starter

    for line in write_starter(directory or config_dirs()[-1][1]):
        print(line)
