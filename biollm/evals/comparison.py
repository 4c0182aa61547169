"""Asks several models the same questions and compares their answers: the way to try a model before trusting it.

inspect-ai is the library for evaluations of any kind. Here the arms go through this user's waterfall, with its limits,
data policy and prices, and the report says what a difference on so few inputs is worth.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, cast

from biollm._runtime import apart, background, ledger
from biollm.client import AllLimitedError, Client, Completion, CompletionError
from biollm.client.ensemble import MOST
from biollm.client.local import gather
from biollm.client.options import Options
from biollm.client.options import check as check_options
from biollm.errors import UsageError, nearest
from biollm.evals import inputs, scoring
from biollm.evals.inputs import Input
from biollm.evals.report import Answer, Report, Used, Verdict, last_line, report
from biollm.evals.results import Results, opened
from biollm.inputs.read import read_input
from biollm.monitoring.usage import gpu_hours
from biollm.routing.attachments import add_text
from biollm.routing.candidates import address, check_names
from biollm.routing.normalize import Rule, at_least, checked, is_number
from biollm.routing.pricing import price
from biollm.routing.structured import ResponseSchema
from biollm.types import Json, Usage, known

_EXCERPT = 4_000  # tokens of a file in the results
_COOLDOWN_S = 60.0  # that an arm is waited for which cools down after a failure
_ENSEMBLE = "ensemble:"
_SOME = Usage(prompt_tokens=1000, completion_tokens=1000)


# What attempts without an answer have used, by arm: they are paid for, too.
_LOST = """
SELECT json_extract(tags, '$.compare') AS arm, sum(cost_usd), total(prompt_tokens), total(completion_tokens)
FROM attempt WHERE at >= ? AND outcome != 'ok' AND arm IS NOT NULL AND prompt_tokens + completion_tokens > 0 GROUP BY arm
"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is asked, and how the answers are judged.

    Attributes:
        arms: "model" or "provider/model", answered by that alone; "ensemble:3" or "ensemble:a,b,c".
        prompt: Asked about every file, and before the question of every line.
        expect: The field of the input and of the structured answer that must be equal, unless `command` or `judge` is given.
        command: See `scoring.by_command`.
        judge: The model that judges pairs of answers, each twice with the order swapped.
        wait: Seconds that a request waits where its arm is at a limit, before it counts as an error.
        spend_limit: USD after which nothing more that costs is sent; 0 sends what is free.
        options: Of every request: temperature, max_tokens, local_only ...
    """

    arms: Sequence[str]
    prompt: str = ""
    system: str | None = None
    schema: Mapping[str, Any] | None = None
    expect: str | None = None
    command: str | None = None
    judge: str | None = None
    wait: float = 600.0
    spend_limit: float | None = None
    concurrency: int = 8
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def check(self, client: Client) -> None:
        """Raise a UsageError for arms that cannot be compared, or ways to score that do not go together."""
        if len(set(self.arms)) < max(2, len(self.arms)):
            raise UsageError("A comparison needs two different arms.", hint="Name them: --a MODEL --b MODEL.")
        amount: Rule = ("a number of at least 0", lambda given: given is None or is_number(given, 0))
        checked(vars(self), {"wait": amount, "spend_limit": amount, "concurrency": at_least(1)})
        check_options(cast("Options", self.options))
        if self.schema:
            ResponseSchema(self.schema).check("schema")
        for arm in (*self.arms, *([self.judge] if self.judge else [])):
            members = _members(arm)
            if isinstance(members, int) and not 1 <= members <= MOST:
                raise UsageError(f"{arm}: an ensemble has 1 to {MOST} members.", hint="Write ensemble:3.")
            for name in () if isinstance(members, int) else members:
                where = address(client.config, name)
                check_names(client.config, where.get("provider"), where.get("model"))
                found = () if self.spend_limit is None else client.explain(**where)
                if not all(price(each.deployment, client.config) for each in found):
                    message = f"The price of {name} is unknown, so the spend limit cannot be kept."
                    raise UsageError(message, hint="Set costs.per_million_tokens in providers.yaml.")

    def check_expect(self, found: Sequence[Input]) -> None:
        """Raise a UsageError where no input, or not the schema, has the field with the right answer."""
        fields = {name for each in found for name in each.record}
        for where, names in (("inputs have", fields), ("schema has", (self.schema or {}).get("properties"))):
            if self.expect and names is not None and self.expect not in names:
                hint = nearest(self.expect, names) or f"Its fields: {', '.join(sorted(names)) or 'none'}."
                raise UsageError(f"The {where} no field {self.expect!r}, which `expect` names.", hint=hint)

    def costs(self, client: Client, arm: str) -> bool:
        """Return whether an answer of this arm may cost something."""
        members = _members(arm)
        places: list[Json] = [{}] if isinstance(members, int) else [address(client.config, name) for name in members]
        prices = [price(each.deployment, client.config) for place in places for each in client.explain(**place)]
        return any(each is None or each.usd(_SOME) for each in prices)

    def key(self, given: Input, *arms: str) -> str:
        """Return what identifies an answer in a file of results: the input, the arm, and what it is asked."""
        asked = [given.digest, arms, self.prompt, self.system, self.schema, dict(self.options)]
        return sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:32]


def compare(
    paths: Sequence[str | Path],
    arms: Sequence[str],
    *,
    results: str | Path | None = None,
    limit: int | None = None,
    client: Client | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    **settings: Any,
) -> Report:
    """Ask every arm every input, and report how they differ.

    Args:
        paths: Logs, folders of logs, JSONL files; see `inputs.read`.
        arms: The models to compare; see `Comparison`.
        results: A JSONL file, which Inspect reads as a dataset too. What it has is not asked again: an interrupted run
            resumes. None keeps nothing.
        limit: Use the first inputs only.
        client: Another than the usual one.
        progress: Called with (done, all, USD) after each answer.
        settings: Fields of `Comparison`; they take precedence over a folder's compare.yaml.

    Raises:
        UsageError: An input, an arm or a setting is wrong.
    """
    if len([name for name in ("expect", "command", "judge") if settings.get(name)]) > 1:
        raise UsageError("--expect, --command and --judge exclude each other.", hint="Choose one.")
    file = Path(results) if results else None
    checked({"limit": 1 if limit is None else limit}, {"limit": at_least(1)})
    found, given = inputs.read([Path(path) for path in paths], file)
    given |= {key: value for key, value in settings.items() if value is not None}
    comparison = Comparison(arms=arms, **given)
    client = client or Client(sender="direct")
    comparison.check(client)
    comparison.check_expect(found)
    run = _Run(comparison, client, found[:limit], progress)
    answers, verdicts = background().run(run.answers(file))
    hours = gpu_hours(client.config, run.began, time.time())
    made = report(arms, run.inputs, answers, verdicts, comparison.expect, hours, run.lost)
    return replace(made, stopped=run.stopped, judge=comparison.judge, unjudged=run.unjudged)


class _Run:
    """One run: the answers and verdicts that are not known yet, and what they cost."""

    def __init__(
        self,
        comparison: Comparison,
        client: Client,
        found: Sequence[Input],
        progress: Callable[[int, int, float], None] | None,
    ) -> None:
        self._asked, self._client, self._progress, self._results = comparison, client, progress, Results()
        self.inputs, self.began, self.stopped = found, time.time(), ""  # why nothing more is sent
        limited = () if comparison.spend_limit is None else (*comparison.arms, comparison.judge)
        self._costly = {arm for arm in limited if arm and comparison.costs(client, arm)}
        self.unjudged = Counter[str]()
        self._usd, self._failed, self.lost = 0.0, False, dict[str, Used]()  # by attempts without an answer
        by_command = scoring.by_command(comparison.command, comparison.expect) if comparison.command else None
        self._score = by_command or (scoring.unscored if comparison.judge else scoring.by_expected(comparison.expect))

    async def answers(self, file: Path | None) -> tuple[list[Answer], list[Verdict]]:
        """Return every answer, and a judge's verdicts on each pair of them."""
        arms = self._asked.arms
        with opened(file) as self._results:
            answers: list[Answer] = await self._all(
                partial(self._answer, given, arms[(at + turn) % len(arms)])  # interleaved: a bad hour hits all alike
                for at, given in enumerate(self.inputs)
                for turn in range(len(arms))
            )
            found = {(each.id, each.arm): each for each in answers if not each.error}
            verdicts: list[Verdict] = await self._all(
                partial(self._judged, given, found[given.id, one], found[given.id, other])
                for given in (self.inputs if self._asked.judge else ())
                for one, other in combinations(arms, 2)
                if {(given.id, one), (given.id, other)} <= found.keys()
            )
        if self._failed:
            self.lost = await apart(self._unanswered)
        return answers, verdicts

    async def _all(self, calls: Iterable[Callable[[], Any]]) -> list[Any]:
        """Return what the calls return, without what was not asked because the run was stopped."""

        def show(done: int, count: int) -> None:
            if self._progress:
                self._progress(done, count, self._spent())

        return [each for each in await gather(list(calls), self._asked.concurrency, show) if each]

    async def _answer(self, given: Input, arm: str) -> Answer | None:
        key = self._asked.key(given, arm)
        if kept := self._results.known.get(key):
            made = known(Answer, kept | {"id": given.id})
            return replace(made, score=await self._score(given, made.text, made.parsed))
        if self._stops(arm):
            return None
        asked = self._asked
        options: Json = {"system": asked.system, "response_model": asked.schema, "tags": {"compare": arm}}
        try:
            answer = await self._paid(partial(self._ask, given, arm, given.prompt(asked.prompt), options))
        except UsageError as error:
            if given.file and str(error).startswith(given.file.name):
                hint = f"{error.hint} To leave it out, name the other files, or move it out of the folder."
                raise UsageError(str(error), hint=hint) from None
            raise UsageError(f"{given.id}: {error}", hint=error.hint) from None
        if isinstance(answer, CompletionError):
            return Answer(id=given.id, arm=arm, error=str(answer))
        score = await self._score(given, answer.text, answer.parsed)
        made = known(Answer, vars(answer) | vars(answer.usage) | {"id": given.id, "arm": arm, "score": score})
        self._results.add(key, _as_dataset(given, self._asked) | vars(made))
        return made

    async def _ask(self, given: Input, arm: str, prompt: Any, options: Json) -> Completion:
        options = {"attachments": [given.file] if given.file else [], "cache": False, **self._asked.options, **options}
        if arm.startswith(_ENSEMBLE):
            return await self._client.aensemble(prompt, members=_members(arm), **options)
        pinned = address(self._client.config, arm)
        return await self._client.acomplete(prompt, **options, **pinned, fallback=False, allow_degraded=True)

    async def _paid(self, ask: Callable[[], Awaitable[Completion]]) -> Completion | CompletionError:
        """Return an answer, or why there is none, and add up the cost. Requests in flight may exceed the limit."""
        answer: Completion | CompletionError
        try:
            answer = await self._patiently(ask)
            self._usd += answer.cost_usd or 0.0
        except CompletionError as error:
            answer = error
        failed = any(each.outcome == "failed" for each in answer.attempts)
        self._failed |= failed
        if failed and self._asked.spend_limit is not None:
            self.lost = await apart(self._unanswered)
        return answer

    def _stops(self, arm: str) -> bool:
        """Return whether nothing more is sent, from the first request of an arm that costs after the limit is reached."""
        limit = self._asked.spend_limit
        if limit is not None and arm in self._costly and self._spent() >= limit:
            self.stopped = f"the spend limit of {limit:.6f} USD is reached"
        return bool(self.stopped)

    async def _patiently(self, ask: Callable[[], Awaitable[Completion]]) -> Completion:
        """Wait where the arm is at a limit, and less long where it cools down: no other model may answer for it."""
        began = time.monotonic()
        while True:
            try:
                return await ask()
            except AllLimitedError as error:
                limited = any(each.outcome == "limited" or each.status == 429 for each in error.attempts)
                longest = self._asked.wait if limited else min(self._asked.wait, _COOLDOWN_S)
                if time.monotonic() + error.retry_after > began + longest:
                    raise
                await asyncio.sleep(error.retry_after + 0.1)

    async def _judged(self, given: Input, one: Answer, other: Answer) -> Verdict | None:
        key = self._asked.key(given, one.arm, other.arm, str(self._asked.judge), one.text, other.text)
        if kept := self._results.known.get(key):
            return Verdict(**kept["verdict"] | {"id": given.id})
        if one.same_as(other):
            return Verdict(given.id, one.arm, other.arm, "tie", contradicted=False)
        judge, question, winners = str(self._asked.judge), given.prompt(self._asked.prompt), list[str]()
        text = question if isinstance(question, str) else json.dumps(question, ensure_ascii=False)
        options: Json = {"response_model": scoring.VERDICT, "tags": {"compare": "judge"}}
        for first, second in ((one, other), (other, one)):
            if self._stops(judge):
                return None
            prompt = scoring.judge_prompt(text, first.text, second.text)
            answer = await self._paid(partial(self._ask, given, judge, prompt, options))
            if isinstance(answer, CompletionError):
                self.unjudged[last_line(str(answer))] += 1
                return None
            winners.append(answer.parsed["winner"])
        made = Verdict(given.id, one.arm, other.arm, *scoring.verdict(*winners))
        self._results.add(key, {"verdict": vars(made)})
        return made

    def _spent(self) -> float:
        return self._usd + sum(each.usd or 0.0 for each in self.lost.values())

    def _unanswered(self) -> dict[str, Used]:
        book = ledger(self._client.config)
        book.flush()
        with book.reading() as db:
            rows = db.execute(_LOST, (self.began,)).fetchall() if db else ()
        return {arm: Used(*used) for arm, *used in rows}


def _members(arm: str) -> int | list[str]:
    """Return the models of an arm, or of how many an ensemble consists."""
    if not arm.startswith(_ENSEMBLE):
        return [arm]
    given = arm.removeprefix(_ENSEMBLE)
    return int(given) if given.isdecimal() else given.split(",")


def _as_dataset(given: Input, asked: Comparison) -> Json:
    """Return an input with the names of Inspect's datasets, a file as its excerpt."""
    target, question = given.expected(asked.expect), given.prompt(asked.prompt)
    if given.file:
        excerpt = read_input(given.file).digest.cut(_EXCERPT).text
        question = add_text([{"role": "user", "content": question}] if isinstance(question, str) else question, excerpt)
    return {"input": question, "target": "" if target is None else str(target)}
