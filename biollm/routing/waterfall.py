"""Calls a sender until a deployment answers: one call per attempt, and a memory of what was tried.

LiteLLM's own failover skips replicas that are up and sends twice (its `order`), or costs seconds (its `fallbacks`), so
fallbacks are off and this loop calls again without what failed. The same loop serves empty answers, cut streams, the
repair of structured answers, the list of attempts and every limit. It runs on the background loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from biollm._runtime import apart, called
from biollm.errors import DeadlineError, InterruptedStreamError
from biollm.inputs.redact import Redaction, Restorer
from biollm.ledger import Claim
from biollm.routing import answers, attachments, deployments, host_check, load_balancing
from biollm.routing.answers import content
from biollm.routing.calls import Call, RefusedError
from biollm.routing.candidates import Candidate, DeploymentPool, blocked_status
from biollm.routing.classify import classify
from biollm.routing.deployments import Deployment
from biollm.routing.failures import CUT_SHORT, STRANGER, Failure, timed_out, unreachable
from biollm.routing.origins import Origins
from biollm.routing.outcomes import Outcomes
from biollm.routing.request import InFlight, Request, Run
from biollm.routing.senders import Sender, Senders
from biollm.routing.structured import Message, ResponseSchema, repair
from biollm.slurm.endpoints import START
from biollm.types import BLOCKED, Attempt, Completion, Json, StreamChunk, StreamRestarted, part

CONNECT_S = 3.0  # that a host has to accept a connection
_TOKEN_MARGIN_S = 120.0  # that a short-lived token must still be good for
_REFRESH_S = 1.0  # between two looks for what other processes know, while nothing may be tried
_SETTLE_S = 10.0  # that a request with no other deployment waits for the first look at the running servers
_REPEAT_S = 0.05  # before a deployment that failed once is tried again


class Waterfall:
    """The deployments of one configuration, tried in order."""

    def __init__(self, pool: DeploymentPool) -> None:
        self.pool = pool
        pool.refresh()
        pool.ledger.refresh()
        self._senders = Senders(pool)
        self._reach = host_check.Reach(CONNECT_S)
        self._servers = host_check.FixedServers()
        self._balance = load_balancing.of_process()
        self._outcomes = Outcomes(pool, self._balance)
        self._origins = Origins(pool.ledger, pool.state)
        self._refreshed = -_REFRESH_S

    def discard(self) -> None:
        """Take back what was registered with LiteLLM; requests under way go on."""
        self._senders.discard()

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
            return self._answered(run, run.spare)
        raise run.failure()

    async def stream(self, request: Request) -> AsyncGenerator[StreamChunk | StreamRestarted, None]:
        """Yield the first answer of the waterfall as it comes; the last chunk carries the Completion.

        Raises:
            CompletionError: No deployment answered.
            InterruptedStreamError: The stream broke after some text, and was not to be restarted.
        """
        run, before = Run(request), ""
        async with request.in_time(run.attempts), aclosing(self._turns(run)) as turns:
            async for ready in turns:
                messages = await self._messages(run, ready)
                inflight = await self._send(run, ready, messages, stream=True)
                if inflight is None:
                    continue
                text, failure = "", None
                async with aclosing(self._relay(run, inflight)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Failure):
                            failure = piece
                        else:
                            text += piece.text
                            yield piece
                if failure is None:
                    completion = self._answered(run, inflight, before=before)
                    yield StreamChunk(completion=completion, kind="usage", chunk=answers.last_chunk(completion))
                    return
                attempt = self._outcomes.fail(run, inflight, failure)
                if request.on_interrupt == "splice":
                    before += text
                    if text.strip():
                        seam = f"\n\n[The stream of {attempt.deployment} broke. Another answer follows.]\n\n"
                        before += seam
                        yield StreamChunk(
                            seam, chunk={"choices": [{"delta": {"content": seam}, "finish_reason": None}]}
                        )
                elif text.strip() and request.on_interrupt == "raise":
                    reason = f"The stream of {attempt.deployment} broke: {attempt.reason}."
                    raise InterruptedStreamError(reason, run.attempts(), partial=text)
                elif text:
                    yield StreamRestarted(attempt)
        if before.strip():
            raise InterruptedStreamError(f"The stream broke. {run.failure()}", run.attempts(), partial=before)
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
            await self._senders.update()
            if run.pinned:
                return [deployment for deployment in self.pool.deployments if deployment.id == run.pinned]
            candidates = await self._candidates(run)
            ready = [candidate.deployment for candidate in candidates if candidate.status == "ready"]
            if first := self._awaited(run, candidates, ready):
                run.start_waiting()
                wait = _seconds_until(first)
                if run.request.on_note:
                    called(run.request.on_note, f"waiting {wait:.1f} s for {first.deployment.id}: {first.reason}")
                await asyncio.sleep(wait)
            elif ready or not await self._servers_appear(candidates):
                break
        for candidate in candidates:
            if candidate.status != "ready":
                run.skip(candidate)
        self._outcomes.note_unserved(run, candidates)
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

    def _awaited(self, run: Run, candidates: Sequence[Candidate], ready: Sequence[Deployment]) -> Candidate | None:
        """Return the earlier deployment than the first of `ready` that frees soonest; None for no wait."""
        worth = [
            each
            for each in candidates
            if each.status in BLOCKED and each.stated and (not ready or each.deployment.order < ready[0].order)
            if _seconds_until(each) <= run.patience(each.deployment, self.pool.config)
        ]
        return min(worth, key=_seconds_until, default=None)

    async def _ask(self, run: Run, ready: Sequence[Deployment]) -> Completion | None:
        """Return the answer of one deployment; None after a failure, or where others have room for a longer one."""
        schema, messages = run.request.schema, await self._messages(run, ready)
        if schema and not ready[0].json_schema:
            messages = schema.in_prompt(messages)
        inflight = await self._send(run, ready, messages)
        if inflight is None:
            return None
        cut = inflight.answer and inflight.answer.first.get("finish_reason") == "length"
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
        return self._answered(run, inflight)

    async def _messages(self, run: Run, ready: Sequence[Deployment]) -> Sequence[Message]:
        """Return the messages for the first order of `ready`: with what fits of the attachments, and redacted."""
        first = [each for each in ready if each.order == ready[0].order]
        messages = await self._fitted(run, first) if run.request.attachments else run.request.messages
        if not any(run.redacts(each) for each in first):
            return messages
        redaction = next(iter(run.redactions.values()), None) or self._redaction(run.request)
        run.redactions |= dict.fromkeys((each.id for each in first), redaction)
        return await apart(redaction.hidden, messages)

    def _redaction(self, request: Request) -> Redaction:
        return Redaction(request.redact_names, (each.secret for each in self.pool.credentials.values()))

    async def _fitted(self, run: Run, first: Sequence[Deployment]) -> Sequence[Message]:
        request = run.request
        sizes = [self.pool.excerpt(each, request.requirements) * run.shrunk.get(each.id, 1) for each in first]
        context, ratio = first[0].context_length, self.pool.ledger.token_ratio(first[0].model)
        fitted = await apart(attachments.fit, request.messages, request.attachments, int(min(sizes)), context, ratio)
        run.fits |= dict.fromkeys((each.id for each in first), fitted)
        return fitted.messages

    def _answered(self, run: Run, inflight: InFlight, parsed: Any = None, before: str = "") -> Completion:
        assert inflight.answer  # noqa: S101
        completion = self._outcomes.complete(run, inflight, inflight.answer, parsed=parsed, before=before)
        self._origins.note(completion.model, part(completion.raw["choices"][0], "message"))
        return completion

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
        answer = content(inflight.answer.first) if inflight.answer else ""
        try:
            parsed = schema.parse(run.restored(inflight.deployment, answer))
        except ValueError as error:
            problem = " ".join(str(error).split())[:500]
        else:
            self._drop_spare(run)
            return self._answered(run, inflight, parsed)
        self._outcomes.fail(run, inflight, Failure("schema", f"the answer does not match the schema: {problem}"))
        if redaction := run.redactions.get(inflight.deployment.id):
            problem = redaction.mask(problem)
        again = await self._send(run, [inflight.deployment], repair(messages, answer, problem)) if retry else None
        return await self._parsed(run, again, schema, messages, retry=False) if again else None

    async def _send(
        self, run: Run, ready: Sequence[Deployment], messages: Sequence[Message], *, stream: bool = False
    ) -> InFlight | None:
        """Call one of the first order of `ready`, since a schema or a key may differ between orders.

        Returns what came, of a stream its first content; None after noting the failure.
        """
        first = [deployment for deployment in ready if deployment.order == ready[0].order]
        sender = await self._senders.choose(run, first)
        messages = await self._origins.returned(messages, first[0].model)
        choice = await self._choose(run, first)  # nothing waits between the choice and the call
        if not choice:
            return None
        inflight = self._prepare(run, choice, stream=stream)
        call = Call(self.pool.ledger, {each.id: self._claim(run, each) for each in inflight.choice})
        try:
            failure = await self._call(run, inflight, sender, call, messages)
        except RefusedError as error:
            self._balance.under_way.discard(inflight)
            run.tried.add(inflight.deployment.id)
            refused = error.refused
            status = blocked_status(refused.key, self.pool.ledger.blocked().get(refused.key))
            run.skip(Candidate(inflight.deployment, status, refused.reason, refused.until))
            return None
        except asyncio.CancelledError:
            self._outcomes.cancel(run, inflight)
            raise
        except Exception as error:
            if inflight.callback_error:
                self._outcomes.cancel(run, inflight)
                raise inflight.callback_error from None
            failure = _classify(inflight, error, translated=call.translated)
        if failure is None:
            self._reach.note(inflight.deployment)
            return inflight
        if inflight.answer:
            await inflight.answer.close()
        self._outcomes.fail(run, inflight, failure)
        if failure.kind == "key":
            await self._reread_key(run, inflight.deployment)
        return None

    async def _choose(self, run: Run, first: Sequence[Deployment]) -> list[Deployment]:
        """Return the least busy of one order that may be sent a request."""
        if len(first) == 1:  # most often, and without the cost of a task
            return [*first] if await self._usable(run, first[0]) and first[0].id in self.pool.claims else []
        usable = await asyncio.gather(*(self._usable(run, deployment) for deployment in first))
        choice = [deployment for deployment, fits in zip(first, usable, strict=True) if fits]
        if len(choice) > 1:
            choice = await self._balance.least_busy(choice, self.pool)
        return [deployment for deployment in choice if deployment.id in self.pool.claims]  # a server may have left

    def _prepare(self, run: Run, choice: Sequence[Deployment], *, stream: bool) -> InFlight:
        configured = deployments.attempt_timeout(choice[0], self.pool.config, stream=stream)
        limit = configured if run.request.timeout is None else run.request.timeout
        return InFlight(choice[0], choice, len(choice) == 1, limit, limit < configured, asyncio.timeout(limit), stream)

    async def _call(
        self, run: Run, inflight: InFlight, sender: Sender, call: Call, messages: Sequence[Message]
    ) -> Failure | None:
        """Let the sender choose and send; return what is wrong with the answer, or with the start of its stream."""
        call.on_choice = partial(self._chosen, run, inflight)
        call.on_send = partial(self._sending, run, inflight)
        try:
            async with inflight.scope:
                inflight.answer = answer = await sender.call(run, inflight, call, messages)
                start = inflight.deployment.start
                if start and not run.request.middle and answer.headers.get(START) != start:
                    return STRANGER  # LiteLLM keeps no headers of plain texts
                if not inflight.stream:
                    return answer.emptiness()
                failure = await answer.first_content()
                inflight.ttft_ms = None if failure else inflight.ms
                return failure
        finally:
            if inflight.connecting:
                inflight.connecting.cancel()

    def _chosen(self, run: Run, inflight: InFlight, ident: str) -> None:
        inflight.deployment = next(each for each in inflight.choice if each.id == ident)
        self._balance.under_way.add(inflight)
        run.pinned = None if run.request.fallback else ident

    def _sending(self, run: Run, inflight: InFlight, ident: str, reservation: int) -> None:
        inflight.reservation, inflight.at, inflight.started = reservation, time.time(), time.perf_counter()
        request = run.request
        new = [note for note in run.notes(inflight.deployment) if note not in run.noted]
        run.noted.update(new)
        calls = [(request.on_note, note) for note in new]
        for callback, about in [*calls, (request.on_send, ident)]:
            if not callback:
                continue
            try:
                called(callback, about)
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
                    renewed = await self._senders.renew(deployment)
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
            renewed = await self._senders.renew(deployment)
            if renewed and renewed.fingerprint != known.fingerprint:
                run.tried.discard(deployment.id)

    async def _relay(self, run: Run, inflight: InFlight) -> AsyncGenerator[StreamChunk | Failure, None]:
        """Yield text and reasoning as they come, tool calls whole at the end, and a Failure if the stream broke.

        So no call leaves of an answer that breaks, and no tool runs twice.
        """
        answer, restore = inflight.answer, _Restored(run.redactions.get(inflight.deployment.id))
        assert answer  # noqa: S101
        try:
            chunk: Json | None = answer.head[-1]  # the first with content
            while chunk is not None:
                if (piece := _piece(chunk, degraded=inflight.deployment.embedded)) and (piece := restore(piece)):
                    yield piece
                async with asyncio.timeout(inflight.limit):
                    chunk = await answer.read()
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
        finally:
            await answer.close()
        if failure := answer.ended():
            yield failure
            return
        for piece in restore.end(answer.fold.frame):
            yield piece
        calls: Sequence[Json] = answers.tool_calls(answer.fold.whole()["choices"][0]) if answer.fold.tool_calls else ()
        for index, call in enumerate(calls):
            call = run.restored(inflight.deployment, {"index": index, **call})
            choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}
            yield StreamChunk(kind="tool_call", chunk={**answer.fold.frame, "choices": [choice]})


class _Restored:
    """Puts what is private back into the pieces of one stream; text and reasoning each have their own rest."""

    def __init__(self, redaction: Redaction | None) -> None:
        names = ("content", "reasoning_content") if redaction else ()
        self._restorers = {name: Restorer(redaction) for name in names if redaction}

    def __call__(self, piece: StreamChunk) -> StreamChunk | None:
        """Return a piece, or None where all of it is kept back."""
        delta = answers.delta_of(piece.chunk)
        changed = {name: each.feed(delta[name]) for name, each in self._restorers.items() if delta.get(name)}
        if not changed:
            return piece
        return _piece(
            {**piece.chunk, "choices": [{**piece.chunk["choices"][0], "delta": delta | changed}]},
            degraded=piece.degraded,
        )

    def end(self, frame: Json) -> list[StreamChunk]:
        """Return what was kept back."""
        rests = ({name: rest} for name, each in self._restorers.items() if (rest := each.end()))
        chunks = ({**frame, "choices": [{"index": 0, "delta": rest}]} for rest in rests)
        return [piece for chunk in chunks if (piece := _piece(chunk, degraded=False))]


def _seconds_until(candidate: Candidate) -> float:
    return max(0.0, candidate.until - time.time()) + 0.01


def _piece(chunk: Json, *, degraded: bool) -> StreamChunk | None:
    """Return what a chunk adds besides tool calls and the end; None for nothing."""
    delta = {name: value for name, value in answers.delta_of(chunk).items() if name != "tool_calls"}
    if not any(value for name, value in delta.items() if name != "role"):
        return None
    text = answers.content_text(delta.get("content") or "")
    choice = {**chunk["choices"][0], "delta": delta, "finish_reason": None}
    kind = "text" if text or not delta.get("reasoning_content") else "reasoning"
    return StreamChunk(text, kind=kind, chunk={**chunk, "choices": [choice]}, degraded=degraded)


def _classify(inflight: InFlight, error: Exception, *, translated: bool = True) -> Failure:
    if not isinstance(error, TimeoutError):
        return classify(error, time.time(), shortened=inflight.shortened, translated=translated)
    check = inflight.connecting
    if check and check.done() and not check.cancelled() and not check.result():
        return unreachable(CONNECT_S)
    return timed_out(inflight.limit, shortened=inflight.shortened, first=inflight.stream)
