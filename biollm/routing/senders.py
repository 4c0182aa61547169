"""Follows the pool of deployments, and sends each call to one of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from biollm._runtime import apart
from biollm.providers.credentials import Credential
from biollm.routing import import_router
from biollm.routing.answers import Answer
from biollm.routing.calls import Call
from biollm.routing.candidates import DeploymentPool
from biollm.routing.deployments import Deployment
from biollm.routing.direct import Direct, speaks
from biollm.routing.request import InFlight, Run
from biollm.routing.structured import Message

if TYPE_CHECKING:
    from biollm.routing.litellm_router import LiteLLMRouter

_SURVEY_WAIT_S = 2.0  # that a request waits for a look at servers and keys


class Sender(Protocol):
    """Calls a deployment."""

    async def call(self, run: Run, inflight: InFlight, call: Call, messages: Sequence[Message]) -> Answer:
        """Choose among the deployments of `inflight`, reserve, send, and return what comes: an answer, or its stream.

        Raises:
            RefusedError: The ledger refused the one that was chosen.
        """
        ...


class Senders:
    """The senders of one pool of deployments. LiteLLM's Router is made on first use, which imports LiteLLM."""

    def __init__(self, pool: DeploymentPool) -> None:
        self._pool = pool
        self._direct = Direct(pool)
        self._router: LiteLLMRouter | None = None
        self._making: asyncio.Future[LiteLLMRouter] | None = None
        self._survey: asyncio.Task[None] | None = None
        self._surveyed = 0.0

    def discard(self) -> None:
        """Take back what the Router registered with LiteLLM; it still serves."""
        if self._router:
            self._router.discard()

    async def update(self) -> None:
        """Follow the servers that run, without a long wait for a slow file system."""
        now = time.monotonic()
        if self._survey is None and self._pool.due():
            self._survey, self._surveyed = asyncio.create_task(self._take_survey()), now
        if self._survey:
            wait = max(0.0, self._surveyed + _SURVEY_WAIT_S - now)
            for done in (await asyncio.wait({self._survey}, timeout=wait))[0]:
                done.result()

    async def _take_survey(self) -> None:
        try:
            if self._pool.apply(await apart(self._pool.survey)) and self._router:
                self._router.follow()
        finally:
            self._survey = None

    async def renew(self, deployment: Deployment) -> Credential | None:
        """Look for the deployment's credential again; return it, or None if there is none now."""
        known = self._pool.credentials.get(deployment.id)
        found = self._pool.note(deployment, await apart(self._pool.look, deployment))
        if found and found != known and self._router:
            self._router.renew(deployment, found)
        return found

    async def choose(self, run: Run, choice: Sequence[Deployment]) -> Sender:
        """Return what calls one of `choice`, which have one order; may take seconds at first, to import LiteLLM."""
        wanted = run.request.sender == "direct" and self._pool.config.routing.sender == "auto"
        if wanted and all(speaks(each, run.request) for each in choice):
            return self._direct
        return self._router or await self._import()

    async def _import(self) -> LiteLLMRouter:
        making = self._making = self._making or asyncio.ensure_future(apart(self._make))
        try:
            self._router = router = await asyncio.shield(making)
        finally:
            if making.done():
                self._making = None
        return router

    def _make(self) -> LiteLLMRouter:
        return import_router()(self._pool)
