"""One call of a sender: what it may choose from, its reservation before anything is sent, and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from biollm.ledger import Claim, Ledger, Refused
from biollm.providers import embedded
from biollm.routing.deployments import Deployment
from biollm.routing.normalize import ANSWER_SIZES
from biollm.routing.request import Run
from biollm.types import Json


class RefusedError(Exception):
    """The ledger refused the deployment that was chosen; nothing was sent."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.refused = refused


@dataclass
class Call:
    """One call of a sender, and how far it came.

    Attributes:
        claims: Deployment id -> its claim on the ledger; ids not in here may not be chosen.
        on_choice: Called with the id of the deployment that was chosen, before anything else happens.
        on_send: Called with that id and the ledger's row just before the request is sent.
        translated: Whether the request was translated and handed to an HTTP client. An error before that, without a
            network error among its causes, came before anything was sent.
        posted: URL -> what came of LiteLLM's one request to it.
    """

    ledger: Ledger
    claims: Mapping[str, Claim]
    on_choice: Callable[[str], None] | None = None
    on_send: Callable[[str, int], None] | None = None
    translated: bool = False
    posted: dict[Any, Exception] = field(default_factory=dict[Any, Exception])

    async def reserve(self, chosen: str) -> None:
        """Reserve for the deployment that was chosen.

        Raises:
            RefusedError: A limit or a cooldown forbids it.
        """
        if self.on_choice:
            self.on_choice(chosen)
        granted = await self.ledger.reserve(self.claims[chosen])
        if isinstance(granted, Refused):
            raise RefusedError(granted)
        if self.on_send:
            self.on_send(chosen, granted)


def parameters(run: Run, deployment: Deployment, *, stream: bool) -> Json:
    """Return the request's parameters as the deployment gets them: the size of the answer, the schema, the stream."""
    request, params = run.request, dict(run.request.params)
    if size := run.answer_size(deployment):
        params |= dict.fromkeys(ANSWER_SIZES & params.keys() or {"max_tokens"}, size)
    if stream:
        params |= {"stream": True, "stream_options": {"include_usage": True}}
    if request.schema and deployment.json_schema:
        params["response_format"] = request.schema.response_format
    if deployment.embedded and "response_format" in params:
        params["extra_body"] = embedded.JSON_SAMPLING | params.get("extra_body", {})
    return params


def text_prompt(middle: tuple[str, str | None], deployment: Deployment) -> str:
    """Return the text to continue; around a gap, with the model's own tokens."""
    prompt, suffix = middle
    if suffix is None or not deployment.fim:
        return prompt
    return "".join(map("".join, zip(deployment.fim, (prompt, suffix, ""), strict=True)))
