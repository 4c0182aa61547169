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
        str | None,
        Argument(
            metavar="[MODEL | HF_REPO]",
            help="A model of type embedded, or a repository on Hugging Face. Default: the first.",
        ),
    ] = None,
    file: Annotated[
        str | None, Argument(metavar="[FILE]", help="Its .gguf file. Default: the 4-bit one (Q4_K_M).")
    ] = None,
) -> None:
    """Download the embedded model, or add another from Hugging Face."""
    from biollm.config import load_config
    from biollm.config.paths import config_dirs, state_dir
    from biollm.providers import embedded

    if model and "/" in model:
        models_yaml = config_dirs()[-1][1] / "models.yaml"
        chosen, weights = embedded.add(model, file or embedded.choose(model), models_yaml, state_dir())
        print(f"{chosen.key}: added to {models_yaml}.")
    else:
        models = {key: each for key, each in load_config().models.items() if each.type == "embedded"}
        name = model or next(iter(models), "")
        if name not in models:
            raise UnknownNameError("embedded model", name, models)
        chosen = models[name]
        weights = embedded.pull(chosen, state_dir())
    print(f"{chosen.key}: {weights.stat().st_size / 1e6:.0f} MB in {weights}")
    print(f'Try it: biollm complete "Say hello" --model {chosen.key}')
