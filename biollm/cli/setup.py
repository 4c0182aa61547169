"""The commands `login` and `embedded pull`: what a provider needs before it answers."""

from __future__ import annotations

import sys
from typing import Annotated

from typer import Argument, Option

from biollm.errors import UnknownNameError, UsageError


def login(
    provider: Annotated[str, Argument(metavar="PROVIDER", help="github_copilot")],
    account: Annotated[str | None, Option(metavar="NAME", help="Account of the provider.")] = None,
) -> None:
    """Log in with a browser, for providers without keys."""
    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.providers import copilot

    accounts = load_config().provider(provider).accounts
    if provider != "github_copilot":
        keys = " or ".join(each.env_key for each in accounts if each.env_key)
        hint = f"It takes a key: set {keys}." if keys else "Only github_copilot does."
        raise UsageError(f"{provider} needs no login.", hint=hint)
    names = [each.name for each in accounts]
    chosen = account or (names[0] if len(names) == 1 else "")
    if not chosen:
        raise UsageError(f"{provider} has several accounts.", hint=f"Add --account: {', '.join(names)}.")
    if chosen not in names:
        raise UnknownNameError("account", chosen, names)
    copilot.login(chosen, state_dir(), show=lambda text: print(text, file=sys.stderr))
    print(f"{provider}/{chosen}: logged in.")


def embedded_pull(
    model: Annotated[
        str | None, Argument(metavar="MODEL", help="A model of type embedded. Default: the first.")
    ] = None,
) -> None:
    """Download the weights of the embedded model."""
    from biollm.config import load_config
    from biollm.config.paths import state_dir
    from biollm.providers import embedded

    models = {key: each for key, each in load_config().models.items() if each.type == "embedded"}
    chosen = model or next(iter(models), "")
    if chosen not in models:
        raise UnknownNameError("embedded model", chosen, models)
    print(embedded.pull(models[chosen], state_dir()))
