"""Answers in this process: one waterfall per configuration and process, and a server on the cluster where asked for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from biollm._runtime import Background, apart, background, called, ledger, ratings, watch
from biollm.client import cache, cache_key
from biollm.config import Config, load_config
from biollm.config.paths import state_dir, weights_dir
from biollm.errors import (
    BiollmError,
    CompletionError,
    ContentPolicyError,
    DeadlineError,
    InterruptedStreamError,
    RequestRejectedError,
)
from biollm.routing import answers, candidates, load_balancing
from biollm.routing.candidates import Candidate, DeploymentPool
from biollm.routing.request import Request
from biollm.routing.waterfall import Waterfall
from biollm.types import DATA_POLICIES, Completion, DataPolicy, Piece

if TYPE_CHECKING:
    from biollm.slurm.endpoints import Watch

T = TypeVar("T")
_Key = tuple[str, DataPolicy, Path]  # of a waterfall: the configuration, the policy, the state folder
_STEP = 1.0  # seconds between two checks of a server that starts
_WATERFALLS = 8  # kept in a process


class Local:
    """The waterfall of one client's configuration.

    Args:
        folder: The folder of the configuration; None reads the usual layers.
        policy: Returns the client's data policy, which the environment may change.
    """

    def __init__(self, folder: Path | None, policy: Callable[[], DataPolicy]) -> None:
        self.config, self._wanted = load_config(folder), policy
        self._key = repr(self.config)
        self._watched: tuple[Background, Watch] | None = None
        self._stale = True

    def identity(self) -> str:
        """Return what configuration and weights add to the key of a stored answer; looks at the folders of weights."""
        return f"{self._configured} {list(_weights(self.config))}"

    @cached_property
    def _configured(self) -> str:
        return cache_key.identity(self.config)

    def _policy(self) -> DataPolicy:
        """Return the stricter of the two policies; a client that is reading its configuration again does not know this one."""
        policies: tuple[DataPolicy, ...] = (self._wanted(), self.config.data_policy)
        return max(policies, key=DATA_POLICIES.index)

    def check_names(self, provider: str | None, model: str | None) -> tuple[str | None, str | None]:
        """Return a provider and a model as requests name them; raise an UnknownNameError if one is not configured."""
        return candidates.check_names(self.config, provider, model)

    def call(self, request: Request) -> LocalCall:
        """Return a call that answers one request."""
        return LocalCall(self, request)

    def explain(self, request: Request) -> Sequence[Candidate]:
        """Return each deployment with its status; see `Client.explain`."""
        servers = watch(self.config.cluster)
        pool = DeploymentPool(
            self.config, ledger(self.config), state_dir(), self._policy(), servers.alive, servers.settle
        )
        found = candidates.explain(pool, request.requirements)
        return background().run(load_balancing.of_process().weighed(found, pool))

    async def waterfall(self) -> Waterfall:
        """Return the process's waterfall for this configuration; made on first use, which imports LiteLLM."""
        here, policy = background(), self._policy()
        if self._watched is None or self._watched[0] is not here:
            self._watched = here, watch(self.config.cluster)
        servers = self._watched[1]
        if not servers.awake:
            await apart(servers.alive)
        kept = here.once("waterfalls", dict[_Key, "asyncio.Future[Waterfall]"])  # changed on the loop alone
        if self._stale:  # keys may have changed
            self._stale = False
            for old in [each for each in kept if each[0] == self._key]:
                _let_go(kept.pop(old))
        key = (self._key, policy, state_dir())
        making = kept.pop(key, None)
        if making is None or (making.done() and (making.cancelled() or making.exception())):
            making = asyncio.ensure_future(apart(self._make, policy, servers))
        kept[key] = making  # the one that was used last is the last
        for old in list(kept)[:-_WATERFALLS]:
            _let_go(kept.pop(old))
        return await asyncio.shield(making)

    def _make(self, policy: DataPolicy, servers: Watch) -> Waterfall:
        return Waterfall(
            DeploymentPool(self.config, ledger(self.config), state_dir(), policy, servers.latest, servers.settle)
        )


@dataclass(frozen=True)
class LocalCall:
    """One request that this process answers, in the four ways of a `remote.Connection`."""

    local: Local
    request: Request

    def complete(self) -> Completion:
        """Return the answer.

        Raises:
            CompletionError: No deployment could answer.
        """
        return background().run(self._complete())

    async def acomplete(self) -> Completion:
        """Like `complete`."""
        return await background().arun(self._complete())

    def stream(self) -> Iterator[Piece]:
        """Yield the answer as it comes. Raises as `complete`."""
        return background().iterate(self._ask(_STREAM))

    def astream(self) -> AsyncGenerator[Piece, None]:
        """Like `stream`."""
        return background().aiterate(self._ask(_STREAM))

    async def _complete(self) -> Completion:
        if self.request.schema:
            self.request.schema.check()
        async with aclosing(self._ask(_WHOLE)) as answers:
            return await anext(answers)

    def _ask(self, way: _Way[T]) -> AsyncGenerator[T, None]:
        return self._cached(way) if self.request.cache else self._send(way)

    async def _cached(self, way: _Way[T]) -> AsyncGenerator[T, None]:
        """Give the stored answer; without one, send, and store what comes."""
        request = self.request
        async with request.in_time():
            flight = await cache.of_process().join(request, self.local.identity, self.local.config.cache)
        if flight.answer:
            ledger(self.local.config).finish(None, "", flight.record())
            ratings().show(flight.answer.id)
            if request.on_note:
                for note in flight.answer.notes:
                    called(request.on_note, note)
            for item in way.give(flight.answer):
                yield item
            return
        async with flight, aclosing(self._send(way)) as items:
            async for item in items:
                if answer := way.answer(item):
                    await flight.keep(answer)
                yield item

    async def _send(self, way: _Way[T]) -> AsyncGenerator[T, None]:
        """Ask once; where a server may be started, without the embedded model first, and again once the server runs."""
        request, missed = self.request, None
        for last in (False, True) if request.start else (True,):
            asked = request
            if not last:
                asked = replace(request, requirements=replace(request.requirements, allow_degraded=False))
            try:
                async with request.in_time():
                    waterfall = await self.local.waterfall()
                async for item in way.send(waterfall, asked):
                    yield item
            except InterruptedStreamError:
                raise
            except CompletionError as error:
                if last:
                    raise missed or error from None
                missed = await self._start(error)
            else:
                return

    async def _start(self, error: CompletionError) -> BiollmError | None:
        """Start a server on the cluster after `error`; return why not where the embedded model may still answer.

        The job stays when the deadline passes or the caller leaves. No thread waits: a step is short.
        """
        from biollm import slurm
        from biollm.routing import on_demand

        if isinstance(error, RequestRejectedError | ContentPolicyError | DeadlineError):
            raise error
        request, config = self.request, self.local.config
        try:
            async with request.in_time(lambda: error.attempts):
                model = await apart(on_demand.startable, config, request.requirements)
                steps = slurm.ensuring(model, config.cluster, timeout=request.wait, on_state=request.on_state)
                while not await apart(next, steps, True):  # noqa: ASYNC110 # other processes set no event
                    await asyncio.sleep(_STEP)
                await apart(watch(config.cluster).refresh)
        except DeadlineError:
            raise
        except BiollmError as missed:
            if not request.requirements.allow_degraded:
                raise
            return missed
        return None


@dataclass(frozen=True)
class _Way(Generic[T]):
    """Whole or as a stream: how an answer is sent for, found among the items that come, and given when it was stored."""

    send: Callable[[Waterfall, Request], AsyncGenerator[T, None]]
    answer: Callable[[T], Completion | None]
    give: Callable[[Completion], Iterable[T]]


async def _whole(waterfall: Waterfall, request: Request) -> AsyncGenerator[Completion, None]:
    yield await waterfall.complete(request)


def _stream(waterfall: Waterfall, request: Request) -> AsyncGenerator[Piece, None]:
    return waterfall.stream(request)


_WHOLE = _Way[Completion](_whole, lambda answer: answer, lambda answer: [answer])
_STREAM = _Way[Piece](_stream, lambda piece: getattr(piece, "completion", None), answers.pieces)


async def gather(
    calls: Sequence[Callable[[], Awaitable[Completion]]],
    concurrency: int,
    progress: Callable[[int, int], None] | None,
) -> list[Completion | CompletionError]:
    """Return the answer of each call, or its error, in order; see `Client.complete_many`."""
    gate, done = asyncio.Semaphore(concurrency), 0

    async def one(call: Callable[[], Awaitable[Completion]]) -> Completion | CompletionError:
        nonlocal done
        async with gate:
            try:
                answer: Completion | CompletionError = await call()
            except CompletionError as error:
                answer = error
        done += 1
        if progress:
            called(progress, done, len(calls))
        return answer

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:  # an error of `progress` or `on_send`, or an interrupt, ends the others too
        for task in tasks:
            task.cancel()


def _weights(config: Config) -> Iterator[tuple[str, str, int, int]]:
    """Yield the files of local weights and adapters with size and time: an adapter may be trained again in its folder."""
    for model in config.models.values():
        if model.type == "local" and (model.path or model.hf_id):
            for folder in filter(None, (model.lora, weights_dir(model, config.cluster))):
                with suppress(OSError):  # there is none
                    for entry in sorted(os.scandir(folder), key=lambda each: each.name):
                        with suppress(OSError):  # a link to nothing
                            found = entry.stat()
                            yield str(folder), entry.name, found.st_size, found.st_mtime_ns


def _let_go(making: asyncio.Future[Waterfall]) -> None:
    """Unregister a waterfall's callbacks from LiteLLM; requests in flight go on."""
    if making.done() and not making.cancelled() and not making.exception():
        making.result().discard()
