"""The command `explain`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from biollm.cli import output
from biollm.cli.complete import File, LocalOnly, MaxTokens, Model, NoCondense, NoDegraded, Provider, System
from biollm.cli.output import Json
from biollm.cli.prompt import read
from biollm.errors import CompletionError
from biollm.types import iso

if TYPE_CHECKING:
    from biollm.routing.candidates import Candidate
    from biollm.routing.pricing import Cost


def explain(
    prompt: Annotated[
        str | None, Argument(metavar="PROMPT", help="A prompt, to check whether it fits; - reads stdin.")
    ] = None,
    file: File = None,
    system: System = None,
    provider: Provider = None,
    model: Model = None,
    local_only: LocalOnly = False,
    capability: Annotated[
        str | None, Option(metavar="NAME", help="Assume the request needs this, such as reasoning.")
    ] = None,
    tools: Annotated[bool, Option("--tools", help="Assume the request uses tools.")] = False,
    no_degraded: NoDegraded = False,
    no_condense: NoCondense = False,
    max_tokens: MaxTokens = None,
    as_json: Json = False,
) -> None:
    """Show which deployment would answer, and why not others.

    Sends no prompt; replicas of a model are asked for their load. Exits 69 when none would.
    """
    from biollm.client import Client

    question, attached = read(prompt, file or [])
    client = Client(provider, model, local_only=local_only, allow_degraded=not no_degraded, sender="direct")
    found = client.explain(
        question,
        attachments=attached,
        condense=not no_condense,
        system=system,
        capability=capability,
        tools=[{}] if tools else None,
        max_tokens=max_tokens,
    )
    ready = [each for each in found if each.status == "ready"]
    if as_json:
        output.as_json([_facts(each) for each in found])
    else:
        _show(found, ready)
    if not ready:
        raise Exit(CompletionError.exit_code)


def _show(found: Sequence[Candidate], ready: Sequence[Candidate]) -> None:
    first = min(ready, key=lambda each: (each.deployment.order, each.load.rank if each.load else ()), default=None)
    if found:
        output.table(("", "#", "deployment", "status", "reason"), _rows(found, first))
    else:
        print("No deployment fits the provider, the model and the data policy together.")
    print(f"\n{first.deployment.id} would answer." if first else "\nNo deployment is available.")


def _rows(found: Sequence[Candidate], first: Candidate | None) -> list[tuple[object, ...]]:
    """Return a row for each deployment; at a terminal one for an account's models that are skipped for one reason."""
    groups: dict[tuple[str, ...], list[Candidate]] = {}
    for each in found:
        alone = each.status == "ready" or not sys.stdout.isatty()
        key = (each.deployment.id,) if alone else (each.deployment.id.split("/")[0], each.status, _reason(each))
        if not alone and each.status == "absent":
            key = (*key[:2], _reason(each).replace(each.deployment.model, "MODEL"))
        groups.setdefault(key, []).append(each)
    rows: list[tuple[object, ...]] = []
    for key, group in groups.items():
        each, last = group[0], group[-1].deployment.order
        order = str(each.deployment.order) if last == each.deployment.order else f"{each.deployment.order}-{last}"
        name = each.deployment.id if len(group) == 1 else f"{key[0]} ({len(group)} models)"
        reason = _reason(each) if len(group) == 1 else key[2]
        rows.append(("→" if each is first else " ", order, name, each.status, reason))
    return rows


def _facts(candidate: Candidate) -> dict[str, Any]:
    deployment, cost, load = candidate.deployment, candidate.cost, candidate.load
    return {
        "deployment": deployment.id,
        "order": deployment.order,
        "provider": deployment.provider.name,
        "account": deployment.account.name,
        "model": deployment.model,
        "standing": candidate.status,
        "reason": candidate.reason,
        "until": iso(candidate.until),
        "cost": cost and _cost(cost),
        "load": load and {"own": load.own, "others": load.others, "metrics": load.told},
    }


def _cost(cost: Cost) -> dict[str, Any]:
    sent, received = (1e6 * each for each in cost.per_token) if cost.per_token else (None, None)
    million = {"prompt_usd_per_million": sent, "answer_usd_per_million": received}
    return {"prompt_tokens": cost.prompt_tokens, "answer_tokens": cost.answer_tokens, **million, "usd": cost.usd}


def _reason(candidate: Candidate) -> str:
    left = candidate.until - time.time()
    reason = f"{candidate.reason} ({left:.0f} s left)" if 0 < left < 86400 else candidate.reason
    return "; ".join(str(each) for each in (reason, candidate.cost, candidate.load) if each)
