"""The commands of `biollm keys`: who may use the gateway's TCP port, and how much."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer import Argument, Option

from biollm.cli import output
from biollm.cli.output import Json
from biollm.types import iso

Name = Annotated[str, Argument(metavar="NAME", help="Whose key it is: a person, a group or a program.")]
Limits = Annotated[list[str] | None, Option(metavar="LIMIT", help="Requests: 30/min; repeatable.")]
Tokens = Annotated[list[str] | None, Option(metavar="LIMIT", help="Tokens: 120k/min; repeatable.")]
Budgets = Annotated[list[str] | None, Option(metavar="LIMIT", help='Money: "10 USD/month"; repeatable.')]
TokenBudgets = Annotated[list[str] | None, Option(metavar="LIMIT", help="Tokens: 30M/month; repeatable.")]
Tags = Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="Store a tag with its usage; repeatable.")]

app = typer.Typer(name="keys", no_args_is_help=True, help="Manage the keys of the gateway's TCP port.")


@app.command()
def add(
    name: Name,
    rate_limit: Limits = None,
    token_limit: Tokens = None,
    token_budget: TokenBudgets = None,
    budget: Budgets = None,
    tag: Tags = None,
    start_local: Annotated[bool, Option("--start-local", help="Its requests may start servers on Slurm.")] = False,
    pages: Annotated[bool, Option("--pages", help="It also opens the page and the metrics of all usage.")] = False,
) -> None:
    """Make a key and print it, once.

    Only its hash is kept, in gateway_keys.yaml. A running gateway takes it at once.
    """
    from biollm.config.paths import tags_of
    from biollm.gateway import keys

    entry: dict[str, Any] = {
        "tags": {key: value for each in tag or () for key, value in tags_of(each, "--tag").items()},
        "rate_limit": rate_limit, "token_limit": token_limit, "token_budget": token_budget, "budget": budget,
        "start_local": start_local, "pages": pages,
    }  # fmt: skip
    key, file = keys.add(name, {field: value for field, value in entry.items() if value})
    print(key)
    print(f"This is the only time that the key of {name} is shown; {file} has its hash.", file=sys.stderr)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the keys, their limits, and what is used of them."""
    from biollm._runtime import ledger
    from biollm.config import load_config
    from biollm.gateway import keys

    book, rows, facts = ledger(load_config()), list[tuple[str, ...]](), list[dict[str, Any]]()
    for key in keys.listed():
        used = [each for claim in (key.requests, key.usage) for each in book.used(claim.scope, claim.limits)]
        tags = ",".join(f"{name}={value}" for name, value in key.tags.items())
        shown = ", ".join(f"{amount:.6f}".rstrip("0").rstrip(".") + f" of {limit}" for limit, amount, _ in used)
        rows.append((key.name, "hash" if key.hashed else "plain", tags or "-", shown or "no limits"))
        facts.append({
            "name": key.name, "hashed": bool(key.hashed), "tags": dict(key.tags), "start_local": key.start_local,
            "limits": [{"limit": str(limit), "used": amount, "resets_at": iso(at)} for limit, amount, at in used],
        })  # fmt: skip
    if as_json:
        output.as_json(facts)
    elif rows:
        output.table(("key", "kept as", "tags", "used"), rows)
    else:
        print("There is no key in gateway_keys.yaml. Make one: biollm keys add NAME", file=sys.stderr)


@app.command()
def revoke(name: Annotated[str, Argument(metavar="NAME", help="The key to remove.")]) -> None:
    """Remove a key; a running gateway refuses it at once."""
    from biollm.gateway import keys

    print(f"The key of {name} is removed from {keys.revoke(name)}.")
