"""Asks several models the same questions and compares their answers: the way to try a model before trusting it.

inspect-ai is the library for evaluations of any kind. Here the arms go through this user's waterfall, with its limits,
data policy and prices, and the report says what a difference on so few inputs is worth.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biollm._runtime import apart, background, ledger
from biollm.client import AllLimitedError, Client, Completion, CompletionError
from biollm.client.local import gather
from biollm.errors import UsageError
from biollm.evals import inputs, scoring
from biollm.evals.inputs import Input
from biollm.evals.report import Answer, Report, Used, Verdict, report
from biollm.inputs.read import read_input
from biollm.routing.attachments import add_text
from biollm.routing.candidates import address, check_names
from biollm.routing.normalize import Rule, checked, is_number
from biollm.routing.pricing import price
from biollm.types import Json

if TYPE_CHECKING:
    from biollm.config import Config
    from biollm.routing.deployments import Deployment

_EXCERPT = 4_000  # tokens of a file in the results
_COOLDOWN_S = 60.0  # that an arm is waited for which cools down after a failure
_ENSEMBLE = "ensemble:"


# What attempts without an answer have used, by arm: they are paid for, too.
_LOST = """
SELECT json_extract(tags, '$.compare') AS arm, sum(cost_usd), total(prompt_tokens), total(completion_tokens)
FROM attempt WHERE at >= ? AND outcome != 'ok' AND arm IS NOT NULL AND prompt_tokens + completion_tokens > 0 GROUP BY arm
"""


@dataclass
class _Spending:
    """What the run has cost in USD; `over` says why nothing more is sent. Requests in flight may exceed the limit."""

    limit: float | None
    answered: float = 0.0
    lost: Mapping[str, Used] = field(default_factory=dict[str, Used])
    over: str = ""

    @property
    def usd(self) -> float:
        return self.answered + sum(each.usd or 0.0 for each in self.lost.values())

    def add(self, answer: Completion) -> None:
        self.answered += answer.cost_usd or 0.0
        self.check()

    def check(self) -> None:
        if self.limit is not None and self.usd >= self.limit:
            self.over = f"the spend limit of {self.limit:.6f} USD is reached"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is asked, and how the answers are judged.

    Attributes:
        arms: "model" or "provider/model", answered by that alone; "ensemble:3" or "ensemble:a,b,c".
        prompt: Asked about every file, and before the question of every line.
        expect: The field of the input and of the structured answer that must be equal.
        command: See `scoring.by_command`.
        judge: The model that judges pairs of answers, each twice with the order swapped.
        wait: Seconds that a request waits where its arm is at a limit, before it counts as an error.
        spend_limit: USD after which nothing more is sent.
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
        checked({"wait": self.wait, "spend_limit": self.spend_limit}, {"wait": amount, "spend_limit": amount})
        if len([each for each in (self.expect, self.command, self.judge) if each]) > 1:
            raise UsageError("--expect, --command and --judge exclude each other.", hint="Choose one.")
        found = [] if self.spend_limit is None else [each.deployment for each in client.explain()]
        for arm in (*self.arms, *([self.judge] if self.judge else [])):
            members = _members(arm) if arm.startswith(_ENSEMBLE) else [arm]
            if members == 0:
                raise UsageError(f"{arm} has no members.", hint="Write ensemble:3, or ensemble:x,y,z.")
            for name in members if isinstance(members, list) else ():
                where = address(client.config, name)
                check_names(client.config, where.get("provider"), where.get("model"))
                if self.spend_limit is not None and not _priced(found, client.config, where):
                    message = f"The price of {name} is unknown, so the spend limit cannot be kept."
                    raise UsageError(message, hint="Set costs.per_million_tokens in providers.yaml.")

    def key(self, given: Input, *arms: str) -> str:
        """Return what identifies an answer in a file of results: the input, the arm, and what it is asked."""
        asked = [given.digest(), arms, self.prompt, self.system, self.schema, dict(self.options)]
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
        results: A JSONL file, which Inspect reads as a dataset too. What it has is not asked again: a run that was
            interrupted goes on. None keeps nothing.
        limit: Use the first inputs only.
        client: Another than the usual one.
        progress: Called with (done, all, USD) after each answer.
        settings: Fields of `Comparison`; they take precedence over a folder's compare.yaml.

    Raises:
        UsageError: An input, an arm or a setting is wrong.
    """
    found, given = inputs.read([Path(path) for path in paths], Path(results) if results else None)
    comparison = Comparison(
        arms=arms, **{**given, **{key: value for key, value in settings.items() if value is not None}}
    )
    client = client or Client(sender="direct")
    comparison.check(client)
    return background().run(_Run(comparison, client, found[:limit], results, progress).report())


class _Run:
    def __init__(
        self,
        comparison: Comparison,
        client: Client,
        found: Sequence[Input],
        results: str | Path | None,
        progress: Callable[[int, int, float], None] | None,
    ) -> None:
        self._asked, self._client, self._inputs, self._progress = comparison, client, found, progress
        self._path = Path(results) if results else None
        if self._path:
            os.close(self._open(self._path))  # that it cannot be written must be known before anything is paid for
        self._known = _results(self._path) if self._path else {}
        self._spending, self._began = _Spending(comparison.spend_limit), time.time()
        by_command = scoring.by_command(comparison.command) if comparison.command else None
        self._score = by_command or (scoring.unscored if comparison.judge else scoring.by_expected(comparison.expect))

    async def report(self) -> Report:
        arms = self._asked.arms
        turns = [
            (given, arms[(at + turn) % len(arms)])  # interleaved, so that a bad hour hits all arms alike
            for at, given in enumerate(self._inputs)
            for turn in range(len(arms))
        ]
        answers = await self._all([partial(self._answer, *turn) for turn in turns])
        by_place = {(each.id, each.arm): each for each in answers if each}
        verdicts: list[Verdict | None] = []
        if self._asked.judge:
            pairs = [
                (given, one, other)
                for given in self._inputs
                for pair in combinations(arms, 2)
                for one, other in [tuple(by_place.get((given.id, arm)) for arm in pair)]
                if one and other and one.text is not None and other.text is not None
            ]
            verdicts = await self._all([partial(self._judged, *pair) for pair in pairs])
        found = [each for each in verdicts if each]
        return report(
            arms, self._inputs, list(by_place.values()), found, self._asked.expect, self._client.config, self._began,
            lost=self._spending.lost, stopped=self._spending.over,
        )  # fmt: skip

    async def _all(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        def report(done: int, count: int) -> None:
            if self._progress:
                self._progress(done, count, self._spending.usd)

        return cast("list[Any]", await gather(calls, self._asked.concurrency, report))

    async def _answer(self, given: Input, arm: str) -> Answer | None:
        key = self._asked.key(given, arm)
        if known := self._known.get(key):
            kept = Answer.of({**known, "id": given.id})
            return replace(kept, score=await self._score(given, kept.text or "", kept.parsed))
        if self._spending.over:
            return None
        error, answer = "", None
        try:
            answer = await self._patiently(partial(self._ask, given, arm))
            self._spending.add(answer)
        except CompletionError as failure:
            error = str(failure)
            self._spending.lost = await apart(self._lost)
            self._spending.check()
        score = await self._score(given, answer.text, answer.parsed) if answer else None
        made = Answer.made(given, arm, answer, score, error)
        if not error:
            self._write({"key": key, **_as_dataset(given, self._asked), **asdict(made)})
        return made

    async def _ask(self, given: Input, arm: str) -> Completion:
        asked = self._asked
        options: Json = {"system": asked.system, "response_model": asked.schema, **asked.options}
        options |= {"attachments": [given.file] if given.file else [], "tags": {"compare": arm}, "cache": False}
        prompt = _prompt(given, asked.prompt)
        if arm.startswith(_ENSEMBLE):
            return await self._client.aensemble(prompt, members=_members(arm), **options)
        pinned = address(self._client.config, arm)
        return await self._client.acomplete(prompt, **options, **pinned, fallback=False, allow_degraded=True)

    async def _patiently(self, ask: Callable[[], Any]) -> Completion:
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
        key = self._asked.key(given, one.arm, other.arm, str(self._asked.judge), str(one.text), str(other.text))
        if known := self._known.get(key):
            return Verdict(**known["verdict"] | {"id": given.id})
        if one.same_as(other):
            return Verdict(given.id, one.arm, other.arm, "tie", contradicted=False)
        if self._spending.over:
            return None
        said: list[str] = []
        pinned = address(self._client.config, str(self._asked.judge))
        options: Json = {**pinned, "fallback": False, "response_model": scoring.VERDICT, "cache": False}
        options["tags"] = {"compare": "judge"}
        question = _prompt(given, self._asked.prompt)
        text = question if isinstance(question, str) else json.dumps(question, ensure_ascii=False)
        for first, second in ((one, other), (other, one)):
            prompt = scoring.judge_prompt(text, str(first.text), str(second.text))
            kept = {"attachments": [given.file] if given.file else [], **self._asked.options}
            try:
                ask = partial(self._client.acomplete, prompt, **(kept | options))
                answer = await self._patiently(ask)
            except CompletionError:
                return None
            self._spending.add(answer)
            said.append(answer.parsed["winner"])
        winner, contradicted = scoring.verdict(*said)
        made = Verdict(given.id, one.arm, other.arm, winner, contradicted)
        self._write({"key": key, "verdict": asdict(made)})
        return made

    def _lost(self) -> dict[str, Used]:
        book = ledger(self._client.config)
        book.flush()
        with book.reading() as db:
            rows = db.execute(_LOST, (self._began,)).fetchall() if db else ()
        return {arm: Used(*used) for arm, *used in rows}

    def _write(self, line: Json) -> None:
        if self._path:
            text = json.dumps(line, ensure_ascii=False) + "\n"  # half a surrogate pair stays as JSON writes it
            with os.fdopen(self._open(self._path), "wb", buffering=0) as file:
                file.write(text.encode(errors="backslashreplace"))

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _members(arm: str) -> int | list[str]:
    given = arm.removeprefix(_ENSEMBLE)
    return int(given) if given.isdecimal() else given.split(",")


def _priced(found: Sequence[Deployment], config: Config, where: Json) -> bool:
    """Return whether every deployment at an address has a known price."""
    named = [
        each
        for each in found
        if where.get("model") in (None, each.model) and where.get("provider") in (None, each.provider.name)
    ]
    return all(price(each, config) for each in named)


def _prompt(given: Input, prompt: str) -> Any:
    """Return the question with the prompt of all inputs before it."""
    if not isinstance(given.question, str):
        return [{"role": "user", "content": prompt}, *given.question] if prompt else list(given.question)
    return "\n\n".join(part for part in (prompt, given.question) if part)


def _as_dataset(given: Input, asked: Comparison) -> Json:
    """Return an input with the names of Inspect's datasets, a file as its excerpt."""
    target, question = given.expected(asked.expect), _prompt(given, asked.prompt)
    if given.file:
        excerpt = read_input(given.file).digest.cut(_EXCERPT).text
        question = add_text([{"role": "user", "content": question}] if isinstance(question, str) else question, excerpt)
    return {"input": question, "target": "" if target is None else str(target)}


def _results(path: Path) -> dict[str, Json]:
    """Return the lines of earlier results by their keys; what an interrupted run left of a line is ended."""
    if not path.is_file() or not path.stat().st_size:
        return {}
    found: dict[str, Json] = {}
    for _, line in inputs.numbered_lines(path):
        with suppress(ValueError, KeyError, TypeError):
            record: Json = json.loads(line)
            found[record["key"]] = record
    if not found:
        raise UsageError(f"{path} holds no results of a comparison.", hint="Name another file with -o.")
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")
    return found
