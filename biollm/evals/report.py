"""The report of a comparison: per arm, per pair of arms, and per input; as text, JSON or one HTML page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from biollm.client.ensemble import plain
from biollm.evals import statistics
from biollm.evals.inputs import Input
from biollm.evals.scoring import Winner
from biollm.monitoring.dashboard import seconds
from biollm.monitoring.usage import quantiles
from biollm.types import counted, short

_SEEN = 5.0  # points: the difference that a report says how many inputs would show
_UNSCORED = "No answer is scored: the inputs have no right answers (`target`, or the field that --expect names)."
_CHANCE = 0.05  # p-values from which a difference may be chance
_LEAST_HOURS = 0.01  # of GPUs that are worth a line
_PAGE = Path(__file__).with_suffix(".html")
HEAD = ("arm", "score", "answers", "errors", "p50", "p95", "tokens in", "out", "USD")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An arm's answer to one input, or its error; times in ms, money in USD."""

    id: str  # the input's
    arm: str
    text: str = ""
    parsed: Any = None
    score: float | None = None
    error: str = ""
    deployment: str = ""
    latency_ms: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None
    notes: Sequence[str] = ()  # what was cut, condensed or redacted for this arm

    def same_as(self, other: Answer) -> bool:
        """Return whether two answers say the same: equal objects, or equal texts."""
        if self.parsed is not None:
            return bool(self.parsed == other.parsed)
        return plain(self.text) == plain(other.text)


@dataclass(frozen=True)
class Verdict:
    """A judge's choice between the answers of two arms to one input."""

    id: str
    one: str
    other: str
    winner: Winner
    contradicted: bool  # it chose the other one when the order was swapped


@dataclass(frozen=True)
class Used:
    """What was used without an answer: USD (None where the price is unknown) and tokens."""

    usd: float | None = 0.0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Sums of one arm; latencies in ms, money in USD; None where there is no value.

    Tokens and cost are those of its answers, and of what this run used without getting one.
    """

    name: str
    answers: int
    errors: int
    reasons: Mapping[str, int]  # why there is no answer -> how often
    score: float | None  # mean, 0 to 1: the agreement with what was expected
    p50_ms: float | None
    p95_ms: float | None
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    gpu_hours: float | None  # of this user's jobs during the run, for a model on the cluster
    changed: int  # inputs that were condensed or redacted for it


@dataclass(frozen=True, kw_only=True)
class Pair:
    """How the second of two arms differs from the first, on the inputs that both answered.

    Attributes:
        other_wins, one_wins, ties: Inputs on which `other` is better, `one` is better, or neither.
        different_answers: Inputs with different answers, whether or not they are scored.
        p: Of the exact sign test; McNemar's for scores of 0 and 1.
        points: Mean difference of the scores, in points of 100; `low` and `high`: its 95% interval.
        contradicted: How often the judge chose the other answer when the order was swapped; None without one.
        sentence: What it means.
    """

    one: str
    other: str
    inputs: int
    other_wins: int = 0
    one_wins: int = 0
    ties: int = 0
    different_answers: int = 0
    p: float | None = None
    points: float | None = None
    low: float | None = None
    high: float | None = None
    contradicted: int | None = None
    sentence: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a comparison found.

    Attributes:
        stopped: Why not every input was asked, or judged; "" if all were.
        unjudged: Why the judge gave no verdict -> on how many pairs of answers.
    """

    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]
    inputs: int
    stopped: str = ""
    judge: str | None = None
    unjudged: Mapping[str, int] = field(default_factory=dict[str, int])
    answers: tuple[Answer, ...] = field(default=(), repr=False)
    expected: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def html(self) -> str:
        """Return one page that needs nothing else."""
        from jinja2 import Environment

        page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE.read_text())
        by_input: defaultdict[str, list[Answer]] = defaultdict(list)
        for each in self.answers:
            by_input[each.id].append(each)
        differing = {ident for ident, found in by_input.items() if any(not each.same_as(found[0]) for each in found)}
        return page.render(
            report=self, head=HEAD, rows=rows(self), lines=lines(self), by_input=by_input, differing=differing
        )


def is_page(file: Path) -> bool:
    """Return whether a file is a page that `Report.html` made, or empty."""
    text, (head, *_) = file.read_text(errors="replace"), _PAGE.read_text().partition("{{")
    return not text or text.startswith(head)


def report(
    arms: Sequence[str],
    inputs: Sequence[Input],
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    expect: str | None,
    hours: Mapping[str, float],
    lost: Mapping[str, Used],
) -> Report:
    """Return the report; `hours` of GPUs by model, `lost` by arm."""
    by_arm: dict[str, dict[str, Answer]] = {arm: {} for arm in arms}
    for each in answers:
        by_arm[each.arm][each.id] = each
    judged = {(each.one, each.other, each.id): each for each in verdicts}
    return Report(
        arms=tuple(_arm(arm, list(found.values()), hours, lost.get(arm, Used())) for arm, found in by_arm.items()),
        pairs=tuple(
            _pair(one, other, [(each, by_arm[one].get(each.id), by_arm[other].get(each.id)) for each in inputs], judged)
            for one, other in combinations(arms, 2)
        ),
        inputs=len(inputs),
        answers=tuple(found[each.id] for each in inputs for found in by_arm.values() if each.id in found),
        expected={each.id: each.expected(expect) for each in inputs},
    )


def last_line(error: str) -> str:
    """Return the last line of an error's message: the attempt that failed last."""
    return error.splitlines()[-1].strip()


def _arm(name: str, found: Sequence[Answer], hours: Mapping[str, float], lost: Used) -> Arm:
    answered = [each for each in found if not each.error]
    scores = [each.score for each in answered if each.score is not None]
    costs = [*(each.cost_usd for each in answered), lost.usd]
    p50, p95 = quantiles({each.latency_ms: 1 for each in answered}, (0.5, 0.95))
    return Arm(
        name=name,
        answers=len(answered),
        errors=len(found) - len(answered),
        reasons=Counter(last_line(each.error) for each in found if each.error),
        score=fmean(scores) if scores else None,
        p50_ms=p50,
        p95_ms=p95,
        prompt_tokens=sum(each.prompt_tokens for each in answered) + int(lost.prompt_tokens),
        completion_tokens=sum(each.completion_tokens for each in answered) + int(lost.completion_tokens),
        cost_usd=None if None in costs else sum(cost for cost in costs if cost is not None),
        gpu_hours=hours.get(name.rpartition("/")[2]),
        changed=sum(bool(each.notes) for each in answered),
    )


def _pair(
    one: str,
    other: str,
    found: Sequence[tuple[Input, Answer | None, Answer | None]],
    judged: Mapping[tuple[str, str, str], Verdict],
) -> Pair:
    clusters: defaultdict[str, list[float]] = defaultdict(list)
    contradicted: list[bool] = []
    differ = count = 0
    for given, first, second in found:
        if not first or not second or first.error or second.error:
            continue
        count += 1
        differ += not first.same_as(second)
        if verdict := judged.get((one, other, given.id)):
            clusters[given.cluster].append({"first": -1.0, "second": 1.0, "tie": 0.0}[verdict.winner])
            contradicted.append(verdict.contradicted)
        elif first.score is not None and second.score is not None:
            clusters[given.cluster].append(second.score - first.score)
    values = [value for cluster in clusters.values() for value in cluster]
    if not values:
        sentence = _differing(differ, count, "answer") if count else "no input has an answer of both"
        return Pair(one=one, other=other, inputs=count, different_answers=differ, sentence=sentence)
    wins, losses = sum(value > 0 for value in values), sum(value < 0 for value in values)
    pair = Pair(
        one=one,
        other=other,
        inputs=len(values),
        other_wins=wins,
        one_wins=losses,
        ties=len(values) - wins - losses,
        different_answers=differ,
        points=100 * fmean(values),
        contradicted=sum(contradicted) if contradicted else None,
    )
    if len(clusters) == 1:
        few = f"{_differing(wins + losses, len(values), 'input')}; inputs about one file say nothing about others"
        return replace(pair, sentence=few)
    p, groups = statistics.sign_test(wins, losses), list(clusters.values())
    low, high = (100 * bound for bound in statistics.bootstrap(groups))
    needed = statistics.inputs_needed(groups, _SEEN / 100)
    return replace(pair, p=p, low=low, high=high, sentence=_sentence(pair, p, low, high, needed))


def _sentence(pair: Pair, p: float, low: float, high: float, needed: int) -> str:
    """Return what the difference is worth, as the lead of the arm with the higher score."""
    better, most, least = pair.other, pair.other_wins, pair.one_wins
    if pair.points and pair.points < 0:
        better, most, least, low, high = pair.one, least, most, 0.0 - high, 0.0 - low
    lead = f"lead {low:+.1f} to {high:+.1f} points (95% interval)"
    if p < _CHANCE and low > 0:
        return f"{better} is better: {most} to {least} of {counted(pair.inputs, 'input')} (p = {p:.2g}); {lead}"
    shown = f"no difference shown: {_differing(most + least, pair.inputs, 'input')} (p = {p:.2g})"
    return f"{shown}; {better}'s {lead}; about {needed} inputs are needed to see {_SEEN:g} points"


def _differing(unequal: int, count: int, noun: str) -> str:
    return f"{unequal} of {counted(count, noun)} differ" + "s" * (1 in (unequal, count))


def rows(found: Report) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table, one per arm, under `HEAD`."""
    for arm in found.arms:
        yield (
            arm.name,
            "-" if arm.score is None else f"{arm.score:.0%}",
            str(arm.answers),
            str(arm.errors),
            *("-" if ms is None else seconds(ms) for ms in (arm.p50_ms, arm.p95_ms)),
            short(arm.prompt_tokens),
            short(arm.completion_tokens),
            "unknown" if arm.cost_usd is None else f"{arm.cost_usd:.6f}",
        )


def lines(found: Report) -> Iterator[str]:
    """Yield the sentences under the table."""
    for arm in found.arms:
        for reason, count in arm.reasons.items():
            yield f"{arm.name}: {count} without an answer: {reason}"
        if arm.changed:
            yield f"{arm.name}: {counted(arm.changed, 'input')} condensed or redacted."
        if (arm.gpu_hours or 0) >= _LEAST_HOURS:
            yield f"{arm.name}: {arm.gpu_hours:.2f} GPU hours."
    for reason, count in found.unjudged.items():
        yield f"{found.judge}: {count} without a verdict: {reason}"
    scored = found.judge or any(arm.score is not None for arm in found.arms)
    if any(arm.answers for arm in found.arms) and not scored:
        yield _UNSCORED
    for pair in found.pairs:
        yield f"{pair.one} and {pair.other}: {pair.sentence}."
        if left_out := found.inputs - pair.inputs:
            yield f"  Left out: {left_out} of {counted(found.inputs, 'input')}, without an answer or a score."
        if pair.contradicted is not None:
            yield f"  The judge contradicted itself in {pair.contradicted} of them when the order was swapped: ties."
    if found.stopped:
        compared = any(pair.other_wins + pair.one_wins + pair.ties for pair in found.pairs)
        yield f"Stopped: {found.stopped}{'' if compared else ', before any answers were compared'}."
