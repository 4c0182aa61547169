"""What an attempt leads to: a cooldown, what is tried next, its row in the ledger, and the Completion."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

from biollm._runtime import ratings
from biollm.ledger import Record
from biollm.providers.credentials import Credential, hide, origin
from biollm.routing import host_check, pricing
from biollm.routing.answers import Answer, content, tool_calls
from biollm.routing.candidates import Candidate, DeploymentPool, cooling_keys, note_refusal
from biollm.routing.deployments import LEAST_EXCERPT, Deployment, central
from biollm.routing.failures import Failure
from biollm.routing.load_balancing import Balance
from biollm.routing.normalize import text as plain
from biollm.routing.request import MIN_RETRY_S, InFlight, Run
from biollm.types import Attempt, Completion, Fields, Json, Usage

_MIN_ANSWER = 16  # tokens of answer that are worth a request
_TELLING = 500  # estimated tokens of a prompt from which a model's way of counting is learned


class Outcomes:
    """Judges and records the attempts on one pool of deployments."""

    def __init__(self, pool: DeploymentPool, balance: Balance) -> None:
        self._pool, self._balance, self._ratings = pool, balance, ratings()

    def fail(self, run: Run, inflight: InFlight, failure: Failure) -> Attempt:
        """Put on cooldown what the failure concerns, decide what is tried next, and record the attempt."""
        deployment, reason, until = inflight.deployment, self._reason(inflight.deployment, failure), 0.0
        if failure.status is None:
            host_check.trust().forget(deployment)
        if not failure.sent and inflight.reservation is not None:
            self._pool.ledger.release(inflight.reservation, deployment.scope)
            inflight.reservation = None
        if not failure.reached and inflight.reservation is not None:  # recorded, but the provider counts nothing
            self._pool.ledger.release(inflight.reservation, deployment.scope)
        if failure.kind == "modality" and failure.sent:
            note_refusal(deployment, run.request.requirements.media)
        run.failures.append((deployment, failure))
        if self._repeats(run, inflight, failure):
            run.repeat = deployment
            run.repeated.add(deployment.id)
        else:
            if inflight.reservation is not None:
                until = self.cool(deployment, failure)
            if until and failure.kind == "limited":
                reason += f" (cooldown {failure.wait or round(until - time.time()):.10g} s)"
            self._move_on(run, deployment, failure, until)
        return self.settle(run, inflight, Attempt(deployment.id, "failed", reason, failure.status, inflight.ms))

    def _repeats(self, run: Run, inflight: InFlight, failure: Failure) -> bool:
        """Return whether the same deployment is tried again at once, after a slip or with fewer tokens."""
        ident = inflight.deployment.id
        if ident in run.repeated:
            return False
        if failure.kind == "too_long" and (fitted := run.fits.get(ident)) and fitted.tokens > LEAST_EXCERPT:
            run.shrunk[ident] = 0.5
            return True
        if failure.kind == "affordable":
            if (failure.afford or 0) < _MIN_ANSWER:
                return False
            run.caps[ident] = failure.afford or 0
            return True
        slip = failure.rule.retry and failure.wait is None and not (inflight.answer and inflight.answer.head)
        if not slip or not run.request.fallback or not inflight.alone:
            return False
        return not self._pool.ledger.failing(self._pool.claims[ident].cooling if ident in self._pool.claims else ())

    def _move_on(self, run: Run, deployment: Deployment, failure: Failure, until: float) -> None:
        """Decide whether this deployment is waited for, and whether others are tried."""
        waits = failure.wait is not None and until and failure.wait <= run.patience(deployment, self._pool.config)
        if waits and not run.pinned:
            run.start_waiting()
        else:
            run.tried.add(deployment.id)
        if self._ends(run, deployment, failure):
            run.over = failure
        if failure.rule.transient:
            run.frees.append(until or time.time() + MIN_RETRY_S)

    def _ends(self, run: Run, deployment: Deployment, failure: Failure) -> bool:
        if failure.kind == "refusal":
            return (deployment.provider.on_refusal or self._pool.config.routing.on_refusal) == "stop"
        if failure.kind == "used_up":  # without a limit of the caller's it was the provider's own, and others differ
            return run.request.requirements.answer is not None and not self.leave_roomier(run, deployment)
        return not failure.rule.next

    def leave_roomier(self, run: Run, deployment: Deployment) -> bool:
        """Return whether others have room for the longer answer that was wanted; then only they are tried."""
        size, requirements = run.answer_size(deployment), run.request.requirements
        wanted = requirements.answer
        if size is None or not run.request.fallback or (wanted is not None and size >= wanted):
            return False
        roomier = {
            each.deployment.id
            for each in self._pool.candidates(requirements, skip={*run.tried, deployment.id})
            if each.status == "ready" and not each.deployment.embedded
            if (run.answer_size(each.deployment) or math.inf) > size
        }
        if roomier:
            run.tried |= {each.id for each in self._pool.deployments} - roomier
        return bool(roomier)

    def cool(self, deployment: Deployment, failure: Failure) -> float:
        """Put on cooldown what the failure concerns; return until when (epoch seconds), 0 for nothing."""
        ledger, scope, widens = self._pool.ledger, failure.cools, failure.rule.widens
        if scope == "account" and deployment.start:
            scope = "endpoint"  # replicas share an account in the ledger, yet each has a queue of its own that is full
        elif scope == "account" and failure.kind == "limited" and not deployment.account.limits:
            scope, widens = "deployment", "account"  # the account's next failure shows whose limit it was
        if not scope:
            return 0.0
        credential = self._pool.credentials.get(deployment.id, Credential())
        keys = {key.partition(":")[0]: key for key in cooling_keys(deployment, credential)}
        cooled = [keys.get(scope, keys["deployment"])]
        if scope == "deployment" and widens and self._fails_alike(deployment, widens, failure):
            cooled.append(keys[widens])
        reason = self._reason(deployment, failure)
        for key in cooled:
            ledger.cool(key, failure.wait, reason, kind=failure.kind, ladder=failure.rule.ladder)
        blocked = ledger.blocked()
        return max((blocked[key].until for key in cooled if key in blocked), default=0.0)

    def _fails_alike(self, deployment: Deployment, scope: str, failure: Failure) -> bool:
        """Return whether another deployment of the same endpoint or account cools down after such a failure."""
        blocked, field = self._pool.ledger.blocked(), "endpoint" if scope == "endpoint" else "scope"
        return any(
            getattr(each, field) == getattr(deployment, field)
            and (found := blocked.get(f"deployment:{each.id}"))
            and found.kind == failure.kind
            for each in self._pool.deployments
            if each.id != deployment.id
        )

    def note_unserved(self, run: Run, candidates: Iterable[Candidate]) -> None:
        """Record, once per request, the first scaled model that had no server for it: the demand for one."""
        for each in () if run.unserved else candidates:
            deployment, model = each.deployment, self._pool.config.server_of(each.deployment.model)
            if each.status == "ready":
                return
            if each.status == "absent" and not deployment.base_url and model and model.scale:
                run.unserved = True
                names = (deployment.id, deployment.provider.name, deployment.account.name, model.key)
                record = Record(time.time(), run.id, *names, "skipped", each.reason, order=deployment.order)
                self._pool.ledger.finish(None, deployment.scope, record)
                return

    def cancel(self, run: Run, inflight: InFlight) -> None:
        """Note that the caller gave up."""
        self.settle(
            run, inflight, Attempt(inflight.deployment.id, "cancelled", "cancelled by the caller", ms=inflight.ms)
        )

    def settle(self, run: Run, inflight: InFlight, attempt: Attempt) -> Attempt:
        """Note and record an attempt without an answer."""
        run.note(inflight.deployment, attempt)
        self._balance.under_way.discard(inflight)
        if inflight.reservation is not None:  # else nothing was sent
            usage = self._usage(run, inflight)
            self._record(run, inflight, attempt, usage, self._usd(inflight, usage))
        return attempt

    def _record(self, run: Run, inflight: InFlight, attempt: Attempt, usage: Usage, cost: float | None) -> None:
        deployment = inflight.deployment
        record = Record(
            at=inflight.at,
            request=run.id,
            deployment=deployment.id,
            provider=deployment.provider.name,
            account=deployment.account.name,
            model=deployment.model,
            outcome=attempt.outcome,
            reason=attempt.reason or run.first_reason(),
            status=attempt.status,
            ms=attempt.ms,
            ttft_ms=inflight.ttft_ms,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost_usd=cost if usage.total_tokens else None,
            order=deployment.order,
            degraded=deployment.embedded,
            estimated=usage.estimated,
            tags=run.request.tags,
        )
        self._pool.ledger.finish(inflight.reservation, deployment.scope, record)

    def complete(
        self, run: Run, inflight: InFlight, answer: Answer, *, before: str = "", parsed: Any = None
    ) -> Completion:
        """Return the Completion of an answer that is whole now; note and record the attempt.

        Args:
            run: The request.
            inflight: The call that was answered.
            answer: What came.
            before: The text that the caller has of a deployment whose stream broke.
            parsed: The object that matches the request's schema.
        """
        deployment, usage = inflight.deployment, self._usage(run, inflight)
        whole = answer.fold.whole() if answer.whole is None else answer.whole
        whole = run.restored(deployment, whole)
        choice: Json = whole["choices"][0]
        message: Json = choice.get("message") or {}
        attempt = Attempt(deployment.id, "ok", ms=inflight.ms)
        run.note(deployment, attempt)
        self._balance.under_way.discard(inflight)
        if deployment.id in self._pool.claims:
            self._pool.ledger.recover(self._pool.claims[deployment.id].cooling)
        completion = Completion(
            text=before + content(choice),
            provider=deployment.provider.name,
            account=deployment.account.name,
            model=deployment.model,
            deployment=deployment.id,
            usage=usage,
            cost_usd=self._usd(inflight, usage),
            latency_ms=run.ms,
            attempts=run.attempts(),
            degraded=deployment.embedded,
            parsed=parsed,
            tool_calls=tuple(tool_calls(choice)),
            finish_reason=choice.get("finish_reason") or "",
            reasoning=message.get("reasoning_content") or "",
            notes=run.notes(deployment),
            id=run.id,
            raw=Fields(whole),
        )
        self._record(run, inflight, attempt, usage, completion.cost_usd)
        self._learn(run, deployment, usage)
        self._keep(run, inflight, completion)
        return completion

    def _keep(self, run: Run, inflight: InFlight, completion: Completion) -> None:
        """Keep the prompt and the answer, where the configuration says so, so that they can be rated."""
        config, request, fitted = self._pool.config, run.request, run.fits.get(inflight.deployment.id)
        local_only = "local_only" in (request.requirements.policy, self._pool.policy)
        if not config.store_rated or request.middle or (local_only and not config.store_rated_local):
            return
        if "judge" in (request.tags.get("ensemble"), request.tags.get("compare")):  # a prompt of biollm's own
            return
        self._ratings.keep(
            run.id,
            inflight.at,
            fitted.messages if fitted else request.messages,
            completion.text,
            model=completion.model,
            tags=request.tags,
            local_only=local_only,
            seconds=config.store_rated,
        )

    def _usage(self, run: Run, inflight: InFlight) -> Usage:
        if not inflight.answer:
            return Usage()
        ratio = self._pool.ledger.token_ratio(inflight.deployment.model)
        return inflight.answer.spent(round(self._estimated(run, inflight.deployment) * ratio))

    def _estimated(self, run: Run, deployment: Deployment) -> int:
        """Return the tokens of the prompt as they are estimated for any model."""
        fitted = run.fits.get(deployment.id)
        return central(run.request.requirements) + (fitted.tokens if fitted else 0)

    def _learn(self, run: Run, deployment: Deployment, usage: Usage) -> None:
        """Learn how this model counts tokens, of a request whose prompt is nothing but enough text."""
        requirements, estimated = run.request.requirements, self._estimated(run, deployment)
        if estimated >= _TELLING and not (usage.estimated or requirements.media or requirements.tools):
            self._pool.ledger.learn_tokens(deployment.model, estimated, usage.prompt_tokens)

    def _usd(self, inflight: InFlight, usage: Usage) -> float | None:
        price = pricing.price(inflight.deployment, self._pool.config)
        return price and price.usd(usage, inflight.answer.service_tier if inflight.answer else None)

    def _reason(self, deployment: Deployment, failure: Failure) -> str:
        """Return why it failed, with where the key is that was refused, or the host that was not reached."""
        reason = self.redact(failure.reason)
        if failure.kind == "unreachable" and deployment.host:
            return f"{deployment.host}: {reason}"
        key = origin(deployment.account) if failure.kind == "key" else ""
        return f"{reason} (key: {key})" if key else reason

    def redact(self, text: str) -> str:
        """Return `text` without any key that this process knows, as the ledger can store it."""
        return plain(hide(text, (found.secret for found in self._pool.credentials.values())))
