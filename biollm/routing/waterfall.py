"""Repeats LiteLLM's choice until a deployment answers: one Router call per attempt, and a memory of what was tried.

LiteLLM's own failover skips replicas that are up and sends twice (its `order`), or costs seconds (its `fallbacks`), so
fallbacks are off and this loop calls again without what failed. The same loop serves empty answers, cut streams, the
repair of structured answers, the list of attempts and every limit. It runs on the background loop.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial

from biollm._runtime import apart, called
from biollm.errors import DeadlineError, InterruptedStreamError
from biollm.ledger import Claim
from biollm.routing import callback, deployments, host_check, load_balancing
from biollm.routing.callback import RefusedError, RouterCall
from biollm.routing.candidates import Candidate, DeploymentPool
from biollm.routing.classify import classify
from biollm.routing.deployments import Deployment
from biollm.routing.failures import BROKE_OFF, CUT, CUT_SHORT, Failure, timed_out, unreachable
from biollm.routing.litellm_private import chunks
from biollm.routing.litellm_router import LiteLLMRouter
from biollm.routing.outcomes import Outcomes
from biollm.routing.request import InFlight, Request, Run
from biollm.routing.responses import content, delta, emptiness, finishes, first_content, fold, stranger, without_text
from biollm.routing.structured import Message, ResponseSchema, repair
from biollm.types import Attempt, Completion, StreamChunk, StreamRestarted

_IMPORTED_IN = os.getpid()
CONNECT_S = 3.0  # that a host has to accept a connection
_CHUNKS = 32  # of a stream, before their text is joined
_TOKEN_MARGIN_S = 120.0  # that a short-lived token must still be good for
_REFRESH_S = 1.0  # between two looks for what other processes know, while nothing may be tried
_SETTLE_S = 10.0  # that a request with no other deployment waits for the first look at the running servers
_REPEAT_S = 0.05  # before a deployment that failed once is tried again


class Waterfall:
    """The deployments of one configuration, tried in order."""

    def __init__(self, pool: DeploymentPool) -> None:
        self.pool = pool
        self._router = LiteLLMRouter(pool)
        self._reach = host_check.Reach(CONNECT_S)
        self._servers = host_check.FixedServers()
        self._balance = load_balancing.of_process()
        self._outcomes = Outcomes(pool, self._balance)
        self._refreshed = -_REFRESH_S

    def discard(self) -> None:
        """Take back what was registered with LiteLLM; requests under way go on."""
        self._router.discard()

    async def complete(self, request: Request) -> Completion:
        """Return the first answer of the waterfall.

        Raises:
            CompletionError: No deployment answered.
        """
        run = Run(request)
        try:
            async with request.in_time(run.attempts), aclosing(self._turns(run)) as turns:
                async for ready in turns:
                    if answer := await self._ask(run, ready):
                        return answer
        except DeadlineError:
            if run.spare is None:
                raise
        except asyncio.CancelledError:
            if run.spare:
                self._outcomes.cancel(run, run.spare)
            raise
        if run.spare:
            return self._outcomes.complete(run, run.spare, run.spare.response)
        raise run.failure()

    async def stream(self, request: Request) -> AsyncGenerator[StreamChunk | StreamRestarted, None]:
        """Yield the first answer of the waterfall as it comes; the last chunk carries the Completion.

        Raises:
            CompletionError: No deployment answered.
            InterruptedStreamError: The stream broke after some text, and was not to be restarted.
        """
        run = Run(request)
        async with request.in_time(run.attempts), aclosing(self._turns(run)) as turns:
            async for ready in turns:
                inflight = await self._send(run, ready, request.messages, stream=True)
                if inflight is None:
                    continue
                text, failure = "", None
                async with aclosing(self._relay(run, inflight)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Failure):
                            failure = piece
                        else:
                            text += piece
                            yield StreamChunk(piece)
                if failure is None:
                    whole = self._router.join(chunks(inflight.response), request.messages)
                    yield StreamChunk(completion=self._outcomes.complete(run, inflight, whole, text=text))
                    return
                attempt = self._outcomes.fail(run, inflight, failure)
                if text.strip() and request.on_interrupt == "raise":
                    reason = f"The stream of {attempt.deployment} broke: {attempt.reason}."
                    raise InterruptedStreamError(reason, run.attempts(), partial=text)
                if text:
                    yield StreamRestarted(attempt)
        raise run.failure()

    async def _turns(self, run: Run) -> AsyncGenerator[list[Deployment], None]:
        """Yield what may be tried next, in order, until nothing is left in any pass."""
        while True:
            while not run.over and (ready := await self._next(run)):
                yield ready
                if not run.request.fallback and run.tried:
                    break
            wait = run.next_pass()
            if wait is None:
                return
            await asyncio.sleep(wait)

    async def _next(self, run: Run) -> list[Deployment]:
        """Return what may be tried next; wait for an earlier deployment within the request's `patience`."""
        if run.repeat:
            same, run.repeat = run.repeat, None
            await asyncio.sleep(_REPEAT_S)
            if same.id in self.pool.claims:  # else its server left
                return [same]
        while True:
            await self._router.update()
            if run.pinned:
                return [deployment for deployment in self.pool.deployments if deployment.id == run.pinned]
            candidates = await self._candidates(run)
            ready = [candidate.deployment for candidate in candidates if candidate.status == "ready"]
            wait = self._wait(run, candidates, ready)
            if wait is not None:
                run.start_waiting()
                await asyncio.sleep(wait)
            elif ready or not await self._servers_appear(candidates):
                break
        for candidate in candidates:
            if candidate.status != "ready":
                run.skip(candidate)
        return ready if run.request.fallback else [each for each in ready if each.order == ready[0].order]

    async def _candidates(self, run: Run) -> list[Candidate]:
        candidates = self.pool.candidates(run.request.requirements, skip=run.tried)
        idle = not any(candidate.status == "ready" for candidate in candidates)
        if idle and time.monotonic() - self._refreshed > _REFRESH_S:
            self._refreshed = time.monotonic()  # nothing is tried, so nothing else shows a success elsewhere
            await apart(self.pool.ledger.refresh)
            candidates = self.pool.candidates(run.request.requirements, skip=run.tried)
        return candidates

    async def _servers_appear(self, candidates: Sequence[Candidate]) -> bool:
        """Wait for a slow first look at the running servers, if one of them may be all there is; return if it came."""
        absent = any(each.status == "absent" and each.deployment.local for each in candidates)
        return absent and not self.pool.settle(0) and await apart(self.pool.settle, _SETTLE_S)

    def _wait(self, run: Run, candidates: Sequence[Candidate], ready: Sequence[Deployment]) -> float | None:
        """Return the seconds until an earlier deployment than the first of `ready` frees; None for no wait."""
        waits = [
            wait
            for each in candidates
            if each.status == "limited" and each.stated and (not ready or each.deployment.order < ready[0].order)
            if (wait := max(0.0, each.until - time.time()) + 0.01) <= run.patience(each.deployment, self.pool.config)
        ]
        return min(waits, default=None)

    async def _ask(self, run: Run, ready: Sequence[Deployment]) -> Completion | None:
        """Return the answer of one deployment; None after a failure, or where others have room for a longer one."""
        schema, messages = run.request.schema, run.request.messages
        if schema and not ready[0].json_schema:
            messages = schema.in_prompt(messages)
        inflight = await self._send(run, ready, messages)
        if inflight is None:
            return None
        cut = inflight.response.choices[0].finish_reason == "length"
        if cut and self._outcomes.leave_roomier(run, inflight.deployment):
            if schema:  # JSON that is cut is no JSON
                self._outcomes.fail(run, inflight, CUT_SHORT)
            else:
                self._drop_spare(run)
                run.spare = inflight
            return None
        if schema:
            return await self._parsed(run, inflight, schema, messages)
        self._drop_spare(run)
        return self._outcomes.complete(run, inflight, inflight.response)

    def _drop_spare(self, run: Run) -> None:
        """Give up the answer that was kept in case no other deployment has a longer one."""
        if spare := run.spare:
            run.spare = None
            attempt = Attempt(spare.deployment.id, "failed", CUT_SHORT.reason, ms=spare.ms)
            self._outcomes.settle(run, spare, attempt)

    async def _parsed(
        self, run: Run, inflight: InFlight, schema: ResponseSchema, messages: Sequence[Message], *, retry: bool = True
    ) -> Completion | None:
        """Return the answer if it matches the schema; else ask the same deployment once more, showing the problem."""
        answer = content(inflight.response)
        try:
            parsed = schema.parse(answer)
        except ValueError as error:
            problem = " ".join(str(error).split())[:500]
        else:
            self._drop_spare(run)
            return self._outcomes.complete(run, inflight, inflight.response, parsed=parsed)
        self._outcomes.fail(run, inflight, Failure("schema", f"the answer does not match the schema: {problem}"))
        again = await self._send(run, [inflight.deployment], repair(messages, answer, problem)) if retry else None
        return await self._parsed(run, again, schema, messages, retry=False) if again else None

    async def _send(
        self, run: Run, ready: Sequence[Deployment], messages: Sequence[Message], *, stream: bool = False
    ) -> InFlight | None:
        """Call one of the first order of `ready`; return what came, or None after noting the failure.

        For a stream, what came is its first content.
        """
        choice = await self._choose(run, ready)
        if not choice:
            return None
        inflight = self._prepare(run, choice, stream=stream)
        call = RouterCall(self.pool.ledger, {each.id: self._claim(run, each) for each in inflight.choice})
        try:
            failure = await self._call(run, inflight, call, messages, stream=stream)
        except RefusedError as error:
            self._balance.under_way.discard(inflight)
            run.tried.add(inflight.deployment.id)
            run.skip(Candidate(inflight.deployment, "limited", error.refused.reason, error.refused.until))
            return None
        except asyncio.CancelledError:
            self._outcomes.cancel(run, inflight)
            raise
        except Exception as error:
            if inflight.callback_error:
                self._outcomes.cancel(run, inflight)
                raise inflight.callback_error from None
            failure = _classify(inflight, call.cause(error), stream=stream, translated=call.translated)
        if failure is None:
            self._reach.note(inflight.deployment)
            return inflight
        if stream and inflight.response is not None:
            with suppress(Exception):
                await inflight.response.aclose()
        self._outcomes.fail(run, inflight, failure)
        if failure.kind == "key":
            await self._reread_key(run, inflight.deployment)
        return None

    async def _choose(self, run: Run, ready: Sequence[Deployment]) -> list[Deployment]:
        """Return the least busy of the first order that may be sent a request.

        A schema or a key may differ between orders, so LiteLLM chooses within one.
        """
        first = [deployment for deployment in ready if deployment.order == ready[0].order]
        usable = await asyncio.gather(*(self._usable(run, deployment) for deployment in first))
        choice = [deployment for deployment, fits in zip(first, usable, strict=True) if fits]
        if len(choice) > 1:
            choice = await self._balance.least_busy(choice, self.pool)
        return [deployment for deployment in choice if deployment.id in self.pool.claims]  # a server may have left

    def _prepare(self, run: Run, choice: Sequence[Deployment], *, stream: bool) -> InFlight:
        configured = deployments.attempt_timeout(choice[0], self.pool.config, stream=stream)
        limit = configured if run.request.timeout is None else run.request.timeout
        alone = len(choice) == 1
        if os.getpid() != _IMPORTED_IN:  # LiteLLM cannot choose from a group in a forked child
            choice = [random.choice(choice)]  # noqa: S311
        return InFlight(choice[0], choice, alone, limit, limit < configured, asyncio.timeout(limit))

    async def _call(
        self, run: Run, inflight: InFlight, call: RouterCall, messages: Sequence[Message], *, stream: bool
    ) -> Failure | None:
        """Let the Router choose and send; return what is wrong with the response."""
        call.on_choice = partial(self._chosen, run, inflight)
        call.on_send = partial(self._sending, run, inflight)
        token = callback.current.set(call)
        try:
            callback.install()
            async with inflight.scope:
                inflight.response = await self._router.call(run, inflight, messages, stream=stream)
                if not run.request.middle and (
                    failure := stranger(inflight)
                ):  # LiteLLM keeps no headers of plain texts
                    return failure
                return await first_content(inflight) if stream else emptiness(inflight.response)
        finally:
            callback.current.reset(token)
            call.on_choice = call.on_send = None  # a connection that is kept open keeps the call that it was opened in
            if inflight.connecting:
                inflight.connecting.cancel()

    def _chosen(self, run: Run, inflight: InFlight, ident: str) -> None:
        inflight.deployment = next(each for each in inflight.choice if each.id == ident)
        self._balance.under_way.add(inflight)
        run.pinned = None if run.request.fallback else ident

    def _sending(self, run: Run, inflight: InFlight, ident: str, reservation: int) -> None:
        inflight.reservation, inflight.at, inflight.started = reservation, time.time(), time.perf_counter()
        if run.request.on_send:
            try:
                called(run.request.on_send, ident)
            except Exception as error:
                inflight.callback_error = error
                raise
        inflight.connecting = self._reach.watch(inflight.deployment, inflight.scope)

    def _claim(self, run: Run, deployment: Deployment) -> Claim:
        claim = self.pool.claim(deployment, run.request.requirements)
        if run.pinned and run.repeats:  # a repeat on the same deployment waits for quotas, not for its own failure
            return replace(claim, cooling=tuple(key for key in claim.cooling if key.startswith(("account:", "key:"))))
        return claim

    async def _usable(self, run: Run, deployment: Deployment) -> bool:
        """Renew a token that ends soon; check who listens, and what a server at a fixed address serves."""
        if (credential := self.pool.credentials.get(deployment.id)) is None:
            run.tried.add(deployment.id)  # its server left
            return False
        inflight, reason = self._prepare(run, [deployment], stream=False), None
        try:
            if credential.ends_within(_TOKEN_MARGIN_S) or deployment.embedded:  # which loads its model now
                async with inflight.scope:
                    renewed = await self._router.renew(deployment)
                credential, reason = renewed or credential, None if renewed else self.pool.missing(deployment)
            inflight.limit = min(inflight.limit, host_check.PATIENCE)
            async with asyncio.timeout(inflight.limit):
                reason = reason or await host_check.trust().objection(deployment, credential, self.pool.config.cluster)
        except Exception as error:  # a discovered server does not accept the connection, or does not answer
            failure = _classify(inflight, error)
            self._outcomes.fail(run, inflight, failure)
            if run.repeat is not deployment:
                self._outcomes.cool(deployment, failure)
            return False
        if not reason and deployment.provider.type == "local" and not deployment.start:
            reason = await self._servers.objection(deployment, credential)
        if reason:
            run.tried.add(deployment.id)
            run.skip(Candidate(deployment, "absent", reason))
        return not reason

    async def _reread_key(self, run: Run, deployment: Deployment) -> None:
        """After a refused key, look whether its file holds another one; if so the deployment may be tried again."""
        known = self.pool.credentials.get(deployment.id)
        if known and not deployment.embedded:
            renewed = await self._router.renew(deployment)
            if renewed and renewed.fingerprint != known.fingerprint:
                run.tried.discard(deployment.id)

    async def _relay(self, run: Run, inflight: InFlight) -> AsyncGenerator[str | Failure, None]:
        """Yield the text of a stream, and a Failure if it broke."""
        response, due, has_text = inflight.response, _CHUNKS, False
        try:
            chunk = inflight.head[-1]  # the first with content
            while chunk is not None:
                if text := delta(chunk):
                    has_text = has_text or bool(text.strip())
                    yield text
                if len(kept := chunks(response)) >= due:
                    fold(kept)
                    due = 2 * len(kept) + _CHUNKS  # what cannot be joined is not tried at every chunk
                async with asyncio.timeout(inflight.limit):
                    chunk = await anext(response, None)
        except (asyncio.CancelledError, GeneratorExit):
            self._outcomes.cancel(run, inflight)
            raise
        except TimeoutError:
            yield timed_out(inflight.limit, shortened=inflight.shortened, what="further text")
            return
        except Exception as error:
            failure = classify(error, time.time(), shortened=inflight.shortened)
            yield Failure("broken", failure.reason) if failure.rule.retry else failure
            return
        finally:  # a stream that was left would go on at the provider
            with suppress(Exception):
                await response.aclose()
        ends = finishes(chunks(response))
        if not ends or ends[-1] == "error":
            yield BROKE_OFF if ends else CUT
        elif not has_text and (failure := without_text(chunks(response))):
            yield failure


def _classify(inflight: InFlight, error: Exception, *, stream: bool = False, translated: bool = True) -> Failure:
    if not isinstance(error, TimeoutError):
        return classify(error, time.time(), shortened=inflight.shortened, translated=translated)
    check = inflight.connecting
    if check and check.done() and not check.cancelled() and not check.result():
        return unreachable(CONNECT_S)
    return timed_out(inflight.limit, shortened=inflight.shortened, first=stream)
