"""Repeats LiteLLM's choice until somebody answers: one Router call per attempt, and a memory of what was tried.

LiteLLM's own failover hops past living replicas and sends twice (its `order`), or costs seconds (its `fallbacks`), so
fallbacks are off and this loop calls again with what failed taken out. The same loop serves empty answers, cut
streams, the repair of structured answers, the list of attempts and every cap. It runs on the background loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import litellm

from biollm._runtime import apart, background, called
from biollm.errors import CompletionError, DeadlineError, InterruptedStreamError
from biollm.ledger import Claim, Record
from biollm.providers import embedded
from biollm.providers.credentials import Credential, hide
from biollm.routing import callback, deployments, host_check, load_balancing, pricing, router_config
from biollm.routing.callback import RefusalError, RouterCall
from biollm.routing.candidates import Candidate, DeploymentPool, cooling_keys, note_refusal
from biollm.routing.deployments import Deployment
from biollm.routing.failures import BROKE_OFF, CUT, CUT_SHORT, Failure, classify, timed_out, unreachable
from biollm.routing.litellm_private import chunks
from biollm.routing.normalize import ANSWER_SIZES
from biollm.routing.normalize import text as plain
from biollm.routing.request import BREATH, InFlight, Request, Run
from biollm.routing.responses import (
    content,
    delta,
    emptiness,
    finishes,
    first_content,
    fold,
    service_tier,
    spent,
    stranger,
    tool_calls,
    without_text,
)
from biollm.routing.structured import Message, repair
from biollm.types import Attempt, Completion, StreamChunk, StreamRestarted, Usage

CONNECT = 3.0  # seconds that a host has to take a connection
_LITELLM: Any = litellm  # its own types are partial
_IMPORTED_IN = os.getpid()
_LOOK = 2.0  # seconds that a request waits for what servers and keys there are
_KEPT = 32  # chunks of a stream, before their text is joined
_CONNECTIONS = 1000  # at once
_IDLE = 60  # seconds that an unused connection is kept, and the address that a name resolved to
_FRESH = 120.0  # seconds that a short-lived token must still be good for
_NEWS = 1.0  # seconds between two looks for what other processes know, while nothing may be asked
_AGAIN = 0.05  # seconds until a deployment that failed once is asked again
_LEAST = 16  # tokens of answer that are worth asking for


class Waterfall:
    """The rungs of one configuration with the Router that serves them."""

    def __init__(self, pool: DeploymentPool) -> None:
        self.pool = pool
        self.ledger = pool.ledger
        self._reach = host_check.Reach(CONNECT)
        self._servers = host_check.FixedServers()
        self._balance = load_balancing.of_process()
        self._refreshed = -_NEWS
        if (close := _LITELLM.close_litellm_async_clients) not in background().closing:
            background().closing.append(close)  # or aiohttp complains at exit
        self._survey: asyncio.Task[None] | None = None
        self._surveyed = 0.0
        pool.refresh()
        pool.ledger.refresh()
        self._router: Any = _LITELLM.Router(model_list=self._entries(), **router_config.router_settings(pool.config))

    def let_go(self) -> None:
        """Take back what the Router registered with LiteLLM; it still serves."""
        self._router.retire()

    def _entries(self) -> list[dict[str, Any]]:
        keys = {ident: _params(found) for ident, found in self.pool.credentials.items()}
        _keep_off_proxies(self.pool.deployments)
        return router_config.model_list(self.pool.deployments, keys)

    async def _follow(self) -> None:
        """Bring the Router up to date with the servers that run, without waiting long for a slow file system."""
        now = time.monotonic()
        if self._survey is None and self.pool.due():
            self._survey, self._surveyed = asyncio.create_task(self._look_around()), now
        if self._survey:
            for done in (await asyncio.wait({self._survey}, timeout=max(0.0, self._surveyed + _LOOK - now)))[0]:
                done.result()

    async def _look_around(self) -> None:
        try:
            if not self.pool.apply(await apart(self.pool.survey)):
                return
        finally:
            self._survey = None
        wanted = {entry["model_info"]["id"]: entry for entry in self._entries()}
        gone = set(self._router.registry().names(kind="ids")) - set(wanted)
        self._change(list(wanted.values()), delete=list(gone))

    def _change(self, upsert: Sequence[dict[str, Any]], delete: Sequence[str] = ()) -> None:
        """Add, replace and remove deployments of the Router."""
        added = [_LITELLM.Deployment(**entry) for entry in upsert]
        self._router.apply(_LITELLM.router_api.ChangeSet(upsert=added, delete=delete))

    async def complete(self, request: Request) -> Completion:
        """Return the first answer of the waterfall.

        Raises:
            CompletionError: Nobody answered.
        """
        run = Run(request)
        try:
            async with _deadline(run), aclosing(self._turns(run)) as turns:
                async for rungs in turns:
                    answer = await self._ask(run, rungs)
                    if answer is not None:
                        return answer
        except DeadlineError:
            if run.spare is None:
                raise
        except asyncio.CancelledError:
            if run.spare:
                self._cancelled(run, run.spare)
            raise
        if run.spare:
            return self._answered(run, run.spare)
        raise run.failure()

    async def stream(self, request: Request) -> AsyncGenerator[StreamChunk | StreamRestarted, None]:
        """Yield the first answer of the waterfall as it comes; the last chunk carries the Completion.

        Raises:
            CompletionError: Nobody answered.
            InterruptedStreamError: The stream broke after some text, and was not to be restarted.
        """
        run = Run(request)
        async with _deadline(run), aclosing(self._turns(run)) as turns:
            async for rungs in turns:
                sent = await self._send(run, rungs, request.messages, stream=True)
                if sent is None:
                    continue
                text: list[str] = []
                failure: Failure | None = None
                async with aclosing(self._relay(run, sent)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Failure):
                            failure = piece
                        else:
                            text.append(piece)
                            yield StreamChunk(piece)
                if failure is None:
                    yield StreamChunk(completion=self._streamed(run, sent, "".join(text)))
                    return
                attempt = self._fail(run, sent, failure)
                if "".join(text).strip() and request.on_interrupt == "raise":
                    why = f"The stream of {attempt.deployment} broke: {attempt.reason}."
                    raise InterruptedStreamError(why, run.attempts(), partial="".join(text))
                if text:
                    yield StreamRestarted(attempt)
        raise run.failure()

    async def _turns(self, run: Run) -> AsyncGenerator[list[Deployment], None]:
        """Yield what may be asked next, until nothing is left in any pass."""
        while True:
            while not run.over and (allowed := await self._next(run)):
                yield allowed
                if not run.request.fallback and run.tried:
                    break
            wait = run.next_pass()
            if wait is None:
                return
            await asyncio.sleep(wait)

    async def _next(self, run: Run) -> list[Deployment]:
        """Return what may be asked next, in order; wait for an earlier deployment where `patience` allows it."""
        if run.repeat:
            same, run.repeat = run.repeat, None
            await asyncio.sleep(_AGAIN)
            if same.id in self.pool.claims:  # else its server left
                return [same]
        while True:
            allowed, wait = await self._allowed(run)
            if wait is None:
                return allowed
            await asyncio.sleep(wait)

    async def _allowed(self, run: Run) -> tuple[list[Deployment], float | None]:
        """Return the deployments that may be asked now, in order, and note why the others may not.

        Where an earlier one frees soon enough for the request's patience, return the seconds until then instead.
        """
        await self._follow()
        if run.pinned:
            return [deployment for deployment in self.pool.deployments if deployment.id == run.pinned], None
        found = self.pool.candidates(run.request.requirements, skip=run.tried)
        if not any(candidate.status == "ready" for candidate in found) and time.monotonic() - self._refreshed > _NEWS:
            self._refreshed = time.monotonic()  # nothing is asked, so nothing else brings news of a success elsewhere
            await apart(self.ledger.refresh)
            found = self.pool.candidates(run.request.requirements, skip=run.tried)
        ready = [candidate.deployment for candidate in found if candidate.status == "ready"]
        waits = [
            wait
            for candidate in found
            if candidate.status == "limited"
            and candidate.stated
            and (not ready or candidate.deployment.order < ready[0].order)
            if (wait := max(0.0, candidate.until - time.time()) + 0.01) <= self._patience(run, candidate.deployment)
        ]
        if waits:
            run.patient()
            return [], min(waits)
        for candidate in found:
            if candidate.status != "ready":
                run.pass_over(candidate)
        if not run.request.fallback:
            ready = [deployment for deployment in ready if deployment.order == ready[0].order]
        return ready, None

    def _patience(self, run: Run, deployment: Deployment) -> float:
        """Return the seconds that this request may still wait for `deployment`, from its first wait on."""
        own = (run.request.patience, deployment.provider.patience, self.pool.config.patience)
        return next((each for each in own if each is not None), 0.0) - run.waited

    async def _ask(self, run: Run, rungs: Sequence[Deployment]) -> Completion | None:
        """Ask once, and once more where the answer has not the wanted schema."""
        schema, messages = run.request.schema, run.request.messages
        if schema and not rungs[0].json_schema:
            messages = schema.in_prompt(messages)
        sent = await self._send(run, rungs, messages)
        if sent and sent.response.choices[0].finish_reason == "length" and self._roomier(run, sent.deployment):
            if schema:  # what is cut is no JSON
                self._fail(run, sent, CUT_SHORT)
            else:
                self._spare(run, sent)
            return None
        if sent is None or schema is None:
            return sent and self._answered(run, sent)
        for last in (False, True):
            answer = content(sent.response)
            try:
                return self._answered(run, sent, parsed=schema.parse(answer))
            except ValueError as error:
                problem = " ".join(str(error).split())[:500]
            self._fail(run, sent, Failure("schema", f"the answer does not match the schema: {problem}"))
            if last:
                return None
            again = await self._send(run, [sent.deployment], repair(messages, answer, problem))
            if again is None:
                return None
            sent = again
        return None

    def _roomier(self, run: Run, deployment: Deployment) -> bool:
        """Return whether others have room for the longer answer that was wanted; then only they are asked."""
        size, requirements = self._size(run, deployment), run.request.requirements
        if (
            size is None
            or not run.request.fallback
            or (requirements.answer is not None and size >= requirements.answer)
        ):
            return False
        status = self.pool.candidates(requirements, skip={*run.tried, deployment.id})
        ready = [
            candidate.deployment
            for candidate in status
            if candidate.status == "ready" and not candidate.deployment.embedded
        ]
        found = {each.id for each in ready if (self._size(run, each) or math.inf) > size}
        if found:
            run.tried |= {each.id for each in self.pool.deployments if each.id not in found}
        return bool(found)

    def _size(self, run: Run, deployment: Deployment) -> int | None:
        """Return the tokens of answer to ask a deployment for: what it has room for and its account can pay."""
        sizes = (deployments.allowance(deployment, run.request.requirements), run.caps.get(deployment.id))
        return min((size for size in sizes if size), default=None)

    def _spare(self, run: Run, sent: InFlight | None) -> None:
        """Keep an answer that was cut for want of room, in case no other deployment has a longer one; the one before it is over."""
        if run.spare:
            self._settle(run, run.spare, Attempt(run.spare.deployment.id, "failed", CUT_SHORT.reason, ms=run.spare.ms))
        run.spare = sent

    async def _send(
        self, run: Run, rungs: Sequence[Deployment], messages: Sequence[Message], *, stream: bool = False
    ) -> InFlight | None:
        """Let the Router ask one of `rungs`; return what came, or None after noting the failure.

        For a stream, what came is its first content. A schema or a key may differ between orders, so the choice is
        among the first order alone; within it LiteLLM chooses among the least busy.
        """
        rungs = await self._fresh(run, [deployment for deployment in rungs if deployment.order == rungs[0].order])
        if len(rungs) > 1:
            rungs = await self._balance.least_busy(rungs, self.pool)
        # Meanwhile a server may have left, and its rung with it.
        if not (rungs := [d for d in rungs if d.id in self.pool.claims]):
            return None
        sent = InFlight(rungs[0], None, time.time(), time.perf_counter(), alone=len(rungs) == 1)
        if os.getpid() != _IMPORTED_IN:
            rungs = [random.choice(rungs)]  # noqa: S311 # LiteLLM cannot choose from a group in a forked child
        call = RouterCall(self.ledger, {d.id: self._need(run, d) for d in rungs})
        limit, shortened = self._limit(run.request, rungs[0], stream)
        scope = asyncio.timeout(limit)
        watch: asyncio.Task[bool] | None = None

        def on_choice(ident: str) -> None:
            sent.deployment = next(d for d in rungs if d.id == ident)
            self._balance.under_way.add(sent)
            run.pinned = None if run.request.fallback else ident

        def on_send(ident: str) -> None:
            nonlocal watch
            sent.reservation, sent.at, sent.started = call.reservation, time.time(), time.perf_counter()
            if run.request.on_send:
                try:
                    called(run.request.on_send, ident)
                except Exception as error:
                    sent.broken = error
                    raise
            watch = self._reach.watch(sent.deployment, scope)

        call.on_choice, call.on_send = on_choice, on_send
        token = callback.current.set(call)
        failure: Failure | None = None
        try:
            callback.install()
            async with scope:
                sent.response = await self._call(run, rungs, messages, limit, stream)
                # LiteLLM keeps no headers of a plain text completion.
                failure = None if run.request.middle else stranger(sent)
                failure = failure or (await first_content(sent) if stream else emptiness(sent.response))
        except RefusalError:
            return self._refused(run, call, sent)
        except asyncio.CancelledError:
            self._cancelled(run, sent)
            raise
        except TimeoutError:
            late = watch is not None and watch.done() and not watch.cancelled() and not watch.result()
            failure = unreachable(CONNECT) if late else timed_out(limit, shortened=shortened, first=stream)
        except Exception as error:
            if sent.broken:
                self._cancelled(run, sent)
                raise sent.broken from None
            failure = classify(call.cause(error), time.time(), shortened=shortened, handed=call.handed)
        finally:
            callback.current.reset(token)
            call.on_choice = call.on_send = None  # a connection that is kept open keeps the call it was opened in
            if watch:
                watch.cancel()
        if failure:
            if stream and sent.response is not None:
                with suppress(Exception):
                    await sent.response.aclose()
            self._fail(run, sent, failure)
            await self._reread_key(run, sent.deployment, failure)
            return None
        self._reach.note(sent.deployment)
        return sent

    def _limit(self, request: Request, deployment: Deployment, stream: bool) -> tuple[float, bool]:
        """Return the seconds an attempt may take, and whether the caller made them fewer than configured."""
        configured = deployments.attempt_timeout(deployment, self.pool.config, stream=stream)
        limit = request.timeout if request.timeout is not None else configured
        return limit, limit < configured

    def _call(
        self, run: Run, rungs: Sequence[Deployment], messages: Sequence[Message], limit: float, stream: bool
    ) -> Any:
        request, first = run.request, rungs[0]
        params: dict[str, Any] = {**request.params, "timeout": limit}
        if size := self._size(run, first):
            params |= dict.fromkeys(ANSWER_SIZES & params.keys() or {"max_tokens"}, size)
        if stream:
            # LiteLLM ignores `timeout` for streams.
            params |= {"stream": True, "stream_timeout": limit, "stream_options": {"include_usage": True}}
        if request.schema and first.json_schema:
            params["response_format"] = request.schema.response_format
        if first.embedded and "response_format" in params:
            params["extra_body"] = embedded.JSON_SAMPLING
        # The host program's LiteLLM callbacks see nothing of ours.
        params |= {"disable_fallbacks": True, "no-log": True}
        group = router_config.LOCAL_GROUP if request.requirements.policy == "local_only" else router_config.GROUP
        model = first.id if len(rungs) == 1 else group  # by its id, LiteLLM need not choose: 1 ms less
        if request.middle:
            prompt, suffix = request.middle
            if suffix is not None and first.fim:
                prompt = "".join(map("".join, zip(first.fim, (prompt, suffix, ""), strict=True)))
            return self._router.atext_completion(model=model, prompt=prompt, **params)
        params["shared_session"] = _session()
        return self._router.acompletion(model=model, messages=list(messages), **params)

    def _need(self, run: Run, deployment: Deployment) -> Claim:
        claim = self.pool.claim(deployment, run.request.requirements)
        if run.pinned and run.passes:  # a repeat on the same deployment waits for quotas, not for its own failure
            kept = tuple(key for key in claim.cooling if key.startswith(("account:", "key:")))
            return replace(claim, cooling=kept)
        return claim

    async def _fresh(self, run: Run, rungs: Sequence[Deployment]) -> list[Deployment]:
        """Return those that may be asked after a closer look; note why the others may not."""
        fit = await asyncio.gather(*(self._fits(run, deployment) for deployment in rungs))
        return [deployment for deployment, fits in zip(rungs, fit, strict=True) if fits]

    async def _fits(self, run: Run, deployment: Deployment) -> bool:
        """Renew a token that ends soon, and check whose server it is, and what one with a fixed address serves."""
        reason: str | None = None
        if (known := self.pool.credentials.get(deployment.id)) is None:
            run.tried.add(deployment.id)
            return False  # its server left
        sent = InFlight(deployment, None, time.time(), time.perf_counter())
        limit, shortened = self._limit(run.request, deployment, stream=False)
        try:
            if known.ends_within(_FRESH) or deployment.embedded:  # which loads its model now
                async with asyncio.timeout(limit):
                    looked = await apart(self.pool.look, deployment)
                if found := self.pool.note(deployment, looked):
                    if found != known:
                        self._renew(deployment, found)
                    known = found
                else:
                    reason = self.pool.missing(deployment)
            limit = min(limit, host_check.PATIENCE)
            async with asyncio.timeout(limit):
                reason = reason or await host_check.trust().objection(deployment, known, self.pool.config.cluster)
        except Exception as error:  # a server that was found does not take the connection, or does not speak
            late = timed_out(limit, shortened=shortened) if isinstance(error, TimeoutError) else None
            failure = late or classify(error, time.time(), shortened=shortened)
            self._fail(run, sent, failure)
            if run.repeat is not deployment:
                self._cool(deployment, failure, self._redact(failure.reason))
            return False
        if not reason and deployment.provider.type == "local" and not deployment.start:
            reason = await self._servers.objection(deployment, known)
        if reason:
            run.tried.add(deployment.id)
            run.pass_over(Candidate(deployment, "absent", reason))
        return not reason

    def _renew(self, deployment: Deployment, found: Credential) -> None:
        self._change(router_config.model_list([deployment], {deployment.id: _params(found)}))

    async def _reread_key(self, run: Run, deployment: Deployment, failure: Failure) -> None:
        """After a refused key, look whether its file holds another one; if so the deployment may be asked again."""
        if failure.kind != "key" or deployment.embedded:
            return
        known = self.pool.credentials.get(deployment.id)
        found = known and self.pool.note(deployment, await apart(self.pool.look, deployment))
        if known and found and found.fingerprint != known.fingerprint:
            self._renew(deployment, found)
            run.tried.discard(deployment.id)

    def _refused(self, run: Run, call: RouterCall, sent: InFlight) -> None:
        """Note that the ledger refused what LiteLLM chose."""
        self._balance.under_way.discard(sent)
        run.tried.add(sent.deployment.id)
        if call.refused:
            run.pass_over(Candidate(sent.deployment, "limited", call.refused.reason, call.refused.until))

    def _fail(self, run: Run, sent: InFlight, failure: Failure) -> Attempt:
        """Put on cooldown what the failure concerns, decide what is asked next, and note the attempt."""
        deployment, rule = sent.deployment, failure.rule
        if failure.status is None:
            host_check.trust().forget(deployment)
        reason, until = self._redact(failure.reason), 0.0
        if not failure.sent and sent.reservation is not None:
            self.ledger.release(sent.reservation, deployment.scope)
            sent.reservation = None
        if failure.kind == "modality" and failure.sent:
            note_refusal(deployment, run.request.requirements.media)
        run.failures.append((deployment, failure))
        if self._once_more(run, sent, failure):
            run.repeat = deployment
            run.repeated.add(deployment.id)
        else:
            if sent.reservation is not None:
                until = self._cool(deployment, failure, reason)
            if until and failure.kind == "limited":
                reason += f" (rests {failure.wait or round(until - time.time()):.10g} s)"
            if run.pinned or failure.wait is None or not until or failure.wait > self._patience(run, deployment):
                run.tried.add(deployment.id)
            else:
                run.patient()
            if self._ends(run, deployment, failure):
                run.over = failure
            if rule.passing:
                run.frees.append(until or time.time() + BREATH)
        return self._settle(run, sent, Attempt(deployment.id, "failed", reason, failure.status, sent.ms))

    def _once_more(self, run: Run, sent: InFlight, failure: Failure) -> bool:
        """Return whether the same deployment is asked again at once, after a slip or with fewer tokens."""
        ident = sent.deployment.id
        if ident in run.repeated:
            return False
        if failure.kind == "affordable":
            if (failure.afford or 0) < _LEAST:
                return False
            run.caps[ident] = failure.afford or 0
            return True
        slip = failure.rule.again and failure.wait is None and not sent.head and run.request.fallback and sent.alone
        return slip and not self.ledger.failing(self.pool.claims[ident].cooling if ident in self.pool.claims else ())

    def _ends(self, run: Run, deployment: Deployment, failure: Failure) -> bool:
        """Return whether no other deployment is asked."""
        if failure.kind == "refusal":
            return (deployment.provider.on_refusal or self.pool.config.on_refusal) == "stop"
        if failure.kind == "used_up":  # without a limit of the caller's it was the provider's own, and others differ
            return run.request.requirements.answer is not None and not self._roomier(run, deployment)
        return not failure.rule.next

    def _cool(self, deployment: Deployment, failure: Failure, reason: str) -> float:
        """Put on cooldown what the failure concerns; return until when (epoch seconds), 0 for nothing."""
        rests, widens = failure.rests, failure.rule.widens
        if rests == "account" and deployment.start:
            rests = "endpoint"  # replicas are one account to the ledger, yet each has a queue of its own that is full
        elif rests == "account" and failure.kind == "limited" and not deployment.account.limits:
            rests, widens = "deployment", "account"  # whose limit it was, the next failure of the account tells
        keys = _by_kind(cooling_keys(deployment, self.pool.credentials.get(deployment.id, Credential())))
        concerned = [keys.get(rests, keys["deployment"])] if rests else []
        if rests == "deployment" and widens and self._alike(deployment, widens, failure):
            concerned.append(keys[widens])
        for key in concerned:
            self.ledger.cool(key, failure.wait, reason, kind=failure.kind, ladder=failure.rule.ladder)
        blocked = self.ledger.blocked()
        return max((blocked[key].until for key in concerned if key in blocked), default=0.0)

    def _alike(self, deployment: Deployment, what: str, failure: Failure) -> bool:
        """Return whether another deployment of the same endpoint or account rests after such a failure."""
        blocked, whose = self.ledger.blocked(), "endpoint" if what == "endpoint" else "scope"
        return any(
            each.id != deployment.id
            and getattr(each, whose) == getattr(deployment, whose)
            and (found := blocked.get(f"deployment:{each.id}")) is not None
            and found.kind == failure.kind
            for each in self.pool.deployments
        )

    def _cancelled(self, run: Run, sent: InFlight) -> None:
        """Note that the caller gave the attempt up."""
        self._settle(run, sent, Attempt(sent.deployment.id, "cancelled", "cancelled by the caller", ms=sent.ms))

    def _settle(self, run: Run, sent: InFlight, attempt: Attempt) -> Attempt:
        """Note an attempt that gave no answer."""
        run.note(sent.deployment, attempt)
        self._record(run, sent, attempt)
        return attempt

    def _record(self, run: Run, sent: InFlight, attempt: Attempt, completion: Completion | None = None) -> None:
        """Write the attempt, which is over, to the ledger, if anything was sent."""
        self._balance.under_way.discard(sent)
        if sent.reservation is None:
            return
        deployment = sent.deployment
        usage = completion.usage if completion else self._spent(run, sent)
        cost = completion.cost_usd if completion else self._usd(deployment, usage, sent.response)
        self.ledger.finish(
            sent.reservation,
            deployment.scope,
            Record(
                at=sent.at,
                request=run.id,
                deployment=deployment.id,
                provider=deployment.provider.name,
                account=deployment.account.name,
                model=deployment.model,
                outcome=attempt.outcome,
                reason=attempt.reason or run.passed_first(),
                status=attempt.status,
                ms=attempt.ms,
                ttft_ms=sent.ttft_ms,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cost_usd=cost if usage.total_tokens else None,
                order=deployment.order,
                degraded=deployment.embedded,
                estimated=usage.estimated,
                tags=run.request.tags,
            ),
        )

    def _answered(self, run: Run, sent: InFlight, *, parsed: Any = None) -> Completion:
        """Return the Completion of a whole answer."""
        if run.spare is not sent:
            self._spare(run, None)
        return self._completion(run, sent, sent.response, text=content(sent.response), parsed=parsed)

    def _streamed(self, run: Run, sent: InFlight, text: str) -> Completion:
        """Return the Completion of a stream that ended well."""
        whole: Any = _LITELLM.stream_chunk_builder(chunks(sent.response), messages=run.request.messages)
        return self._completion(run, sent, whole, text=text)

    def _completion(self, run: Run, sent: InFlight, whole: Any, *, text: str, parsed: Any = None) -> Completion:
        """Return the Completion of `whole`, LiteLLM's response, and note and record the attempt."""
        deployment, choice, usage = sent.deployment, whole.choices[0], self._spent(run, sent)
        attempt = Attempt(deployment.id, "ok", ms=sent.ms)
        run.note(deployment, attempt)
        if deployment.id in self.pool.claims:
            self.ledger.recover(self.pool.claims[deployment.id].cooling)
        completion = Completion(
            text=text,
            provider=deployment.provider.name,
            account=deployment.account.name,
            model=deployment.model,
            deployment=deployment.id,
            usage=usage,
            cost_usd=self._usd(deployment, usage, sent.response),
            latency_ms=run.ms,
            attempts=run.attempts(),
            degraded=deployment.embedded,
            parsed=parsed,
            tool_calls=tuple(call.model_dump() for call in tool_calls(choice)),
            finish_reason=choice.finish_reason or "",
            raw=whole,
        )
        self._record(run, sent, attempt, completion)
        return completion

    def _spent(self, run: Run, sent: InFlight) -> Usage:
        return spent(sent, run.request.requirements.prompt * 5 // 4)  # `prompt` is a lower bound

    def _usd(self, deployment: Deployment, usage: Usage, response: Any) -> float | None:
        """Return the price of an answer in USD; None where it is unknown."""
        price = pricing.price(deployment, self.pool.config)
        return price and price.usd(usage, service_tier(response))

    async def _relay(self, run: Run, sent: InFlight) -> AsyncGenerator[str | Failure, None]:
        """Yield the text of a stream; at last a Verdict if it broke."""
        limit, shortened = self._limit(run.request, sent.deployment, stream=True)
        due, said = _KEPT, False
        try:
            for chunk in sent.head:
                if text := delta(chunk):
                    said = said or bool(text.strip())
                    yield text
            while True:
                async with asyncio.timeout(limit):
                    chunk = await anext(sent.response, None)
                if chunk is None:
                    break
                if text := delta(chunk):
                    said = said or bool(text.strip())
                    yield text
                if len(kept := chunks(sent.response)) >= due:
                    fold(kept)
                    due = 2 * len(kept) + _KEPT  # what cannot be joined is not tried at every chunk
        except (asyncio.CancelledError, GeneratorExit):
            self._cancelled(run, sent)
            raise
        except TimeoutError:
            yield timed_out(limit, shortened=shortened, what="further text")
            return
        except Exception as error:
            failure = classify(error, time.time(), shortened=shortened)
            yield Failure("broken", failure.reason) if failure.rule.again else failure
            return
        finally:  # a stream that was left would go on at the provider
            with suppress(Exception):
                await sent.response.aclose()
        ends = finishes(chunks(sent.response))
        if not ends or ends[-1] == "error":
            yield BROKE_OFF if ends else CUT
        elif not said and (failure := without_text(chunks(sent.response))):
            yield failure

    def _redact(self, text: str) -> str:
        """Return `text` without any key that this process knows, as the ledger can store it."""
        return plain(hide(text, (found.secret for found in self.pool.credentials.values())))


@asynccontextmanager
async def _deadline(run: Run) -> AsyncGenerator[None]:
    """Bound a whole call."""
    try:
        async with run.request.in_time(run.attempts):
            yield
    except CompletionError as error:
        raise error from None


def _by_kind(keys: Sequence[str]) -> dict[str, str]:
    """Return the ledger's keys by what they are of: "account", "endpoint", "deployment", "key"."""
    return {key.partition(":")[0]: key for key in keys}


def _session() -> aiohttp.ClientSession:
    """Return the one pool of connections of this process, made on its loop.

    LiteLLM makes one for each key, address and timeout, and forgets the older of 200 of them with their connections
    open. Proxies and certificates are its own business at each request, also here.
    """
    here = background()
    if "session" not in here.kept:
        connector = aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=_IDLE, ttl_dns_cache=_IDLE)
        here.kept["session"] = made = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        here.closing.append(made.close)
    return here.kept["session"]


def _keep_off_proxies(found: Sequence[Deployment]) -> None:
    """Take local hosts out of the proxy's reach; LiteLLM would send even loopback requests through HTTP_PROXY."""
    hosts = {urlsplit(d.base_url).hostname or "" for d in found if d.local and d.base_url}
    hosts |= {"127.0.0.1" for d in found if d.embedded}
    if getproxies() and (through := sorted(host for host in hosts if not proxy_bypass(host))):
        kept = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [kept, *through]))


def _params(found: Credential) -> dict[str, Any]:
    """Return a credential as LiteLLM's parameters."""
    # LiteLLM would refuse more than `rpm` requests at once; the ledger counts, over all processes.
    params: dict[str, Any] = {"api_key": found.secret or "none", "max_parallel_requests": 1_000_000}
    if found.headers:
        params["extra_headers"] = dict(found.headers)
    if found.base_url:
        params["api_base"] = found.base_url
    return params
