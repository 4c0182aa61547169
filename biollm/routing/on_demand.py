"""Chooses the model server to start on the cluster for a request that no other deployment can answer."""

from __future__ import annotations

from biollm import slurm
from biollm.config import Config, Model
from biollm.errors import BiollmError, UnavailableError
from biollm.routing.deployments import Requirements, asked_for, build_deployments, ineligible_reason
from biollm.slurm.script import render


def startable(config: Config, requirements: Requirements) -> Model:
    """Return the first local model that may serve, fits its GPUs, and whose weights and environment are there.

    Raises:
        UnavailableError: There is none; the message says why for each.
    """
    why: list[str] = []
    for deployment in build_deployments(config):
        if deployment.provider.type != "local" or not asked_for(deployment, requirements):
            continue
        if (model := config.server_of(deployment.model)) is None:
            continue
        reason = ineligible_reason(deployment, requirements) or _cannot_start(config, model)
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
