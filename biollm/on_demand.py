"""Starts a model server on the cluster for a request that no other rung can answer."""

from __future__ import annotations

from collections.abc import Callable

from biollm import routing, slurm
from biollm.config import Config, Model
from biollm.errors import BiollmError, UnavailableError
from biollm.launch import render
from biollm.routing import Wants
from biollm.tickets import Job


def startable(config: Config, wants: Wants) -> Model:
    """Return the first local model that may serve, fits its GPUs, and whose weights and environment are there.

    Raises:
        UnavailableError: There is none; the message says why for each.
    """
    why: list[str] = []
    for deployment in routing.deployments(config):
        if deployment.provider.type != "local" or not routing.asked_for(deployment, wants):
            continue
        if (model := config.models.get(deployment.model)) is None:
            continue
        reason = routing.obstacle(deployment, wants) or _cannot_start(config, model)
        if reason is None:
            return model
        why.append(f"  {model.key}: {reason}")
    told = "\n".join(why) or "  no local model is configured, or asked for"
    raise UnavailableError(f"No model can be started on the cluster.\n{told}", hint="`biollm doctor` checks the rest.")


def _cannot_start(config: Config, model: Model) -> str | None:
    try:
        render([model], config.cluster)
    except BiollmError as error:
        return str(error).splitlines()[0]
    lacks = next(slurm.missing([model], config.cluster), None)
    return f"{lacks} {lacks.hint or ''}".strip() if lacks else None


def start(config: Config, wants: Wants, wait: float | None, on_state: Callable[[Job], None] | None) -> None:
    """Start that model's server, or wait for the one that is already on its way.

    Args:
        config: The configuration.
        wants: What the request needs.
        wait: Seconds until it must be ready; the job stays when they pass.
        on_state: Called with the job whenever it has changed.

    Raises:
        UnavailableError: No model can be started.
        SlurmError: Slurm refused, the job ended, or `wait` passed.
    """
    slurm.ensure(startable(config, wants), config.cluster, timeout=wait, on_state=on_state)
