"""Asks several deployments the same question at once, and combines their answers.

LiteLLM's Fusion (a panel, a judge and a synthesis) is in no release. A vote over short structured answers is what
gains robustly. Of texts one is chosen and none is written anew, so that every result has an author.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack, cast

from biollm._runtime import ratings
from biollm.errors import CompletionError, UsageError
from biollm.routing.candidates import Candidate, address, check_names
from biollm.routing.structured import ResponseSchema
from biollm.types import Attempt, Completion, Fields, Json, Parsed, Usage, counted

if TYPE_CHECKING:
    from biollm.client.options import Options, Prompt
    from biollm.config import Config

Method = Literal["vote", "judge"]
_OF_JUDGE = ("local_only", "data_policy", "timeout", "attachments", "redact", "redact_names", "sender")
MOST = 16  # members: each is a request of its own
_ASK = "Below are {} answers to one question. Choose the one that is most correct and useful; length is no merit."


class Asked(Protocol):
    """What an ensemble uses of a client."""

    @property
    def config(self) -> Config: ...  # noqa: D102
    async def acomplete(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> Completion: ...  # noqa: D102


@dataclass(frozen=True)
class Member:
    """One member of an ensemble.

    Attributes:
        name: "provider/model", or as it was named.
        answer: Its answer, or the error that it ended with.
    """

    name: str
    answer: Completion | CompletionError


@dataclass(frozen=True)
class EnsembleCompletion(Completion[Parsed]):
    """The answer of an ensemble; tokens, cost and attempts are those of its members and its judge together.

    Attributes:
        members: Every member, in order.
        agreement: Share of the answers (0 to 1) that agree with the result: in the fields with few possible values
            (enumerations, booleans, integers) where a schema has such, else in every field, or the text.
        by_field: The share for each field of a structured answer.
        reason: How the result was chosen: "4 of 5 say category = memory", or what the judge wrote.
    """

    members: tuple[Member, ...] = ()
    agreement: float = 0.0
    by_field: Mapping[str, float] = field(default_factory=dict[str, float])
    reason: str = ""

    def panel(self) -> Json:
        """Return what it adds to a completion, as JSON."""
        names = ("deployment", "text", "cost_usd", "latency_ms")
        members = [
            {"name": each.name, "error": _line(each.answer)}
            if isinstance(each.answer, CompletionError)
            else {"name": each.name, **{name: getattr(each.answer, name) for name in names}}
            for each in self.members
        ]
        return {"agreement": self.agreement, "by_field": self.by_field, "reason": self.reason, "members": members}


async def ask(
    client: Asked,
    prompt: Prompt | None,
    options: Options,
    candidates: Sequence[Candidate],
    *,
    members: int | Sequence[str],
    method: Method | None,
    quorum: int | None,
    judge: str | None,
) -> EnsembleCompletion:
    """Return the combined answer; see `Client.ensemble`."""
    started, deadline = time.monotonic(), options.get("deadline")
    names = _names(client, candidates, members)
    needed = len(names) // 2 + 1 if quorum is None else quorum
    if not 1 <= needed <= len(names):
        raise UsageError(f"quorum is {needed}; with {counted(len(names), 'member')} it must be 1 to {len(names)}.")
    if method not in (None, "vote", "judge"):
        raise UsageError(f"method is {method!r}; it must be 'vote' or 'judge'.")
    if judge is not None:
        _check_name(client, judge)  # before anything is paid for
    tags = dict(options.get("tags", {}))
    one: Options = {**options, "fallback": False, "allow_degraded": False, "cache": False}
    one["tags"] = tags | {"ensemble": "member"}
    one.pop("deadline", None)  # it holds for all of them together
    asked = [asyncio.ensure_future(client.acomplete(prompt, **_pinned(client, one, name))) for name in names]
    try:
        await asyncio.wait(asked, timeout=deadline)
    finally:
        for task in asked:
            task.cancel()
    settled = await asyncio.gather(*asked, return_exceptions=True)
    found = [Member(name, _settled(outcome, deadline)) for name, outcome in zip(names, settled, strict=True)]
    answers = [each.answer for each in found if isinstance(each.answer, Completion)]
    if len(answers) < needed:
        raise _too_few(found, len(answers), needed)
    schema, verdict = options.get("response_model"), None
    if schema is not None and method != "judge":
        result = _vote_by_field(answers, ResponseSchema(schema))
    elif method == "vote" or len({plain(each.text) for each in answers}) == 1:
        result = _vote(answers)
    else:
        judging: Options = {name: options[name] for name in _OF_JUDGE if name in options}  # type: ignore[assignment]
        judging |= {"allow_degraded": False, "cache": False, "tags": tags | {"ensemble": "judge"}}
        if deadline is not None:
            judging["deadline"] = max(1.0, started + deadline - time.monotonic())
        result, verdict = await _judged(client, prompt or options.get("messages"), answers, judging, judge)
    if "compare" not in tags:
        ratings().show(result.id, result.text)
    parts = [*(each.answer for each in found), *([verdict] if verdict else [])]
    return _summed(replace(result, members=tuple(found), latency_ms=(time.monotonic() - started) * 1000), parts)


def _names(client: Asked, candidates: Sequence[Candidate], members: int | Sequence[str]) -> list[str]:
    """Return the members: as named, or of so many deployments, each account's first before any other's second.

    Where there are fewer deployments than members, they are asked several times.
    """
    count_of(members)
    if not isinstance(members, int):
        for name in members:
            _check_name(client, name)
        return list(members)
    ready = [each.deployment for each in candidates if each.status == "ready" and not each.deployment.embedded]
    if not ready:
        attempts = [Attempt(each.deployment.id, "skipped", each.reason) for each in candidates if each.reason]
        raise CompletionError("No deployment is available for an ensemble.", attempts, hint="See `biollm explain`.")
    turns = Counter[str]()
    ranked: list[tuple[int, int, str]] = []
    for at, each in enumerate(ready):
        ranked.append((turns[each.scope], at, f"{each.provider.name}/{each.model}"))
        turns[each.scope] += 1
    unique = list(dict.fromkeys(name for *_, name in sorted(ranked)))
    return [unique[at % len(unique)] for at in range(members)]


def count_of(members: int | Sequence[str]) -> int:
    """Return how many requests an ensemble sends, without its judge's."""
    if isinstance(members, str) or not (isinstance(members, int) or all(isinstance(name, str) for name in members)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"members is {members!r}; it must be a number, or a list of models.")
    if not 1 <= (count := members if isinstance(members, int) else len(members)) <= MOST:
        raise UsageError(f"An ensemble has 1 to {MOST} members, not {count}.")
    return count


def _check_name(client: Asked, name: str) -> None:
    check_names(client.config, *map(address(client.config, name).get, ("provider", "model")))


def _pinned(client: Asked, options: Options, name: str) -> Options:
    """Return the options of a call that only this model answers."""
    whole = {"provider": None, "model": None, **options, **address(client.config, name)}
    return cast("Options", whole)


def _settled(outcome: Completion | BaseException, deadline: float | None) -> Completion | CompletionError:
    if isinstance(outcome, Completion | CompletionError):
        return outcome
    if isinstance(outcome, asyncio.CancelledError):
        return CompletionError(f"No answer within {deadline:g} s.")
    raise outcome  # a mistake of the caller's


def _too_few(members: Sequence[Member], count: int, needed: int) -> CompletionError:
    lines = [f"  {each.name}: {_line(each.answer)}" for each in members if isinstance(each.answer, CompletionError)]
    attempts = [attempt for each in members for attempt in each.answer.attempts]
    message = "\n".join([f"{count} of {counted(len(members), 'member')} answered; at least {needed} must.", *lines])
    return CompletionError(message, attempts, hint="Name other members, or ask for fewer of them.")


def _line(error: CompletionError) -> str:
    """Return the reason of what failed last, else of what was last skipped."""
    last = max(reversed(error.attempts), key=lambda each: each.outcome == "failed", default=None)
    return (last and last.reason) or str(error).split("\n")[0]


def _vote(answers: Sequence[Completion]) -> EnsembleCompletion:
    """Return the text that most give; of equally many, that of the earliest member."""
    count = Counter(plain(each.text) for each in answers)
    top = max(count.values())
    best = next(each for each in answers if count[plain(each.text)] == top)
    return _ensemble(best, agreement=top / len(answers), reason=f"{top} of {len(answers)} give this answer")


def _vote_by_field(answers: Sequence[Completion], schema: ResponseSchema) -> EnsembleCompletion:
    """Return the object with the value of the majority in each field.

    A field without a majority, such as a sentence, is that of the member that agrees with the majority most.
    """
    objects = [json.loads(answer.text) if answer.parsed is None else _data(answer.parsed) for answer in answers]
    if not all(isinstance(each, dict) for each in objects):
        return _vote(answers)
    names = list(dict.fromkeys(name for each in objects for name in each))
    count = {name: Counter(_key(each.get(name)) for each in objects) for name in names}
    most = [sum(count[name][_key(each.get(name))] - 1 for name in names) for each in objects]
    at = most.index(max(most))
    best, whole = objects[at], dict(objects[at])
    for name in names:
        value = next(
            each.get(name) for each in objects if count[name][_key(each.get(name))] == max(count[name].values())
        )
        if count[name][_key(best.get(name))] < max(count[name].values()):
            whole[name] = value
    text = json.dumps(whole, ensure_ascii=False)
    try:
        parsed = schema.parse(text)
    except ValueError:  # the fields of several do not match together
        whole, parsed, text = best, answers[at].parsed, answers[at].text
    shares = {name: count[name][_key(whole.get(name))] / len(answers) for name in names}
    decided = [name for name in names if _few_values(schema.json_schema, name)]
    agree = sum(all(_key(each.get(name)) == _key(whole.get(name)) for name in decided or names) for each in objects)
    said = [
        f"{round(shares[name] * len(answers))} of {len(answers)} say {name} = {whole.get(name)}" for name in decided
    ]
    message = {**answers[at].raw["choices"][0]["message"], "content": text}
    raw = Fields({**answers[at].raw, "choices": [{**answers[at].raw["choices"][0], "message": message}]})
    result = replace(answers[at], text=text, parsed=parsed, raw=raw)
    reason = ", ".join(said) or f"{agree} of {len(answers)} agree"
    return _ensemble(result, agreement=agree / len(answers), by_field=shares, reason=reason)


async def _judged(
    client: Asked, question: Any, answers: Sequence[Completion], options: Options, judge: str | None
) -> tuple[EnsembleCompletion, Completion | CompletionError]:
    """Return the answer that a judge chooses, and the judge's own or its error; without one, that of the earliest member."""
    asked = question if isinstance(question, str) else json.dumps(question, ensure_ascii=False)
    texts = [f"## Answer {number}\n{each.text}" for number, each in enumerate(answers, 1)]
    prompt = "\n\n".join([_ASK.format(len(answers)), f"## Question\n{asked}", *texts])
    number = {"type": "integer", "minimum": 1, "maximum": len(answers)}
    fields = {"answer": number, "reason": {"type": "string"}}
    options["response_model"] = {"title": "choice", "type": "object", "properties": fields, "required": list(fields)}
    try:
        verdict = await client.acomplete(prompt, **(_pinned(client, options, judge) if judge else options))
    except CompletionError as error:
        return _ensemble(answers[0], reason=f"the judge did not answer ({_line(error)}): the first answer"), error
    choice: Json = verdict.parsed
    chosen = answers[int(choice["answer"]) - 1]
    agree = sum(plain(each.text) == plain(chosen.text) for each in answers) / len(answers)
    return _ensemble(chosen, agreement=agree, reason=choice["reason"]), verdict


def _ensemble(best: Completion, **more: Any) -> EnsembleCompletion:
    return EnsembleCompletion(**{each.name: getattr(best, each.name) for each in fields(Completion)}, **more)


def _summed(result: EnsembleCompletion, parts: Sequence[Completion | CompletionError]) -> EnsembleCompletion:
    """Return the result with the tokens, cost and attempts of all its parts."""
    answers = [each for each in parts if isinstance(each, Completion)]
    costs = [each.cost_usd for each in answers]
    used: Json = {each.name: sum(getattr(answer.usage, each.name) for answer in answers) for each in fields(Usage)}
    return replace(
        result,
        usage=Usage(**used | {"estimated": used["estimated"] > 0}),
        cost_usd=None if None in costs else sum(cast("list[float]", costs)),
        attempts=tuple(attempt for each in parts for attempt in each.attempts),
    )


def plain(text: str) -> str:
    """Return a text without what does not count when answers are compared: case, white space, a last full stop."""
    return " ".join(text.split()).casefold().rstrip(".")


def _key(value: Any) -> Hashable:
    return plain(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _data(parsed: Any) -> Any:
    return parsed.model_dump(mode="json") if hasattr(parsed, "model_dump") else parsed


def _few_values(schema: Json, name: str) -> bool:
    """Return whether a field is an enumeration, a boolean or an integer."""
    spec: Json = schema.get("properties", {}).get(name) or {}
    spec = spec if isinstance(spec, dict) else {}  # true: any value  # pyright: ignore[reportUnnecessaryIsInstance]
    spec = schema.get("$defs", {}).get(spec.get("$ref", "").rpartition("/")[2], spec)
    return "enum" in spec or "const" in spec or spec.get("type") in ("boolean", "integer")
