"""The ledger's figures as Prometheus text, for `biollm usage --prometheus` and a gateway's `/metrics`.

LiteLLM's Prometheus callback counts one process and needs its proxy; these cover every process that shares the ledger.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from biollm.config import Config
from biollm.ledger import Ledger, history
from biollm.ledger.history import Cell, Key
from biollm.monitoring import usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)  # seconds
_EVERYTHING = 1 << 30  # hours


class _Family(NamedTuple):
    name: str
    kind: str
    help: str
    samples: Iterable[tuple[str, dict[str, str], float]]  # suffix, labels, value


def text(config: Config, ledger: Ledger) -> str:
    """Return every metric. Counters cover all that the ledger has seen; durations are within 2%."""
    cells, _ = history.cells(ledger, 0.0, time.time(), 0, _EVERYTHING)
    quotas = usage.quotas(config, ledger)
    cached, sent = usage.split(cells)
    families = (
        *_counters(_COUNTERS, sent),
        *_counters(_SAVED, cached),
        *_durations(cells),
        *_gauges(quotas),
        *_scaling(config),
    )
    return "".join(f"{line}\n" for family in families for line in _lines(family))


_Counters = Sequence[tuple[str, str, Callable[[Key, Cell], Mapping[tuple[str, str] | None, float]]]]
_COUNTERS: _Counters = (
    ("requests", "Requests sent to a provider, by outcome.", lambda key, cell: {("outcome", key.outcome): cell.attempts}),
    ("failures", "Requests that a provider failed, by kind of failure.",
     lambda key, cell: {("reason", key.why): cell.attempts} if key.outcome == "failed" else {}),
    ("fallbacks", "Requests answered by a later candidate, by why the first one did not answer.",
     lambda key, cell: {("reason", key.why): cell.attempts} if key.outcome == "ok" and key.why else {}),
    ("tokens", "Tokens sent (input) and received (output).",
     lambda _, cell: {("type", "input"): cell.prompt, ("type", "output"): cell.completion}),
    ("cost_usd", "Cost in USD of the requests whose price is known, by your prices or LiteLLM's.",
     lambda _, cell: {None: cell.cost} if cell.prompt + cell.completion > cell.unpriced_prompt + cell.unpriced_completion
     else {}),  # unknown, not 0
    ("unpriced_requests", "Requests with tokens whose price is unknown.", lambda _, cell: {None: cell.unpriced}),
)  # fmt: skip


_SAVED: _Counters = (
    ("cached_requests", "Requests to which a stored answer was given.", lambda _, cell: {None: cell.attempts}),
    ("saved_tokens", "Tokens that stored answers saved.", lambda _, cell: {None: cell.prompt + cell.completion}),
    ("saved_cost_usd", "Cost in USD that stored answers saved, where it is known.",
     lambda _, cell: {None: cell.cost} if cell.unpriced < cell.attempts else {}),
)  # fmt: skip


def _counters(table: _Counters, cells: usage.Cells) -> Iterator[_Family]:
    for name, description, values in table:
        counts: defaultdict[str, float] = defaultdict(float)
        for key, cell in cells:
            labels = {"provider": key.provider, "account": key.account, "model": key.model}
            for label, value in values(key, cell).items():
                counts[json.dumps(labels | dict([label] if label else []))] += value
        samples = [("", json.loads(labels), count) for labels, count in sorted(counts.items())]
        yield _Family(f"biollm_{name}_total", "counter", description, samples)


def _durations(cells: usage.Cells) -> Iterator[_Family]:
    groups: defaultdict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for key, cell in cells:
        if key.outcome == "ok":
            groups[key.provider, key.account, key.model].append(cell)
    for name, description, which in (
        ("request_duration", "Seconds from sending a request to its whole answer.", "ms"),
        ("time_to_first_token", "Seconds from sending a request to the first token of its stream.", "ttft"),
    ):
        samples = [
            sample
            for (provider, account, model), group in sorted(groups.items())
            for sample in _histogram(
                history.latencies(getattr(cell, which) for cell in group),
                {"provider": provider, "account": account, "model": model},
            )
        ]
        yield _Family(f"biollm_{name}_seconds", "histogram", description, samples)


def _histogram(latencies: Mapping[float, int], labels: dict[str, str]) -> Iterator[tuple[str, dict[str, str], float]]:
    if not latencies:
        return
    counts = sorted((ms / 1000, count) for ms, count in latencies.items())
    values, upto = [value for value, _ in counts], [0, *accumulate(count for _, count in counts)]
    for bound in _BOUNDS:
        yield "_bucket", labels | {"le": f"{bound:g}"}, upto[bisect_right(values, bound)]
    yield "_bucket", labels | {"le": "+Inf"}, upto[-1]
    yield "_sum", labels, sum(value * count for value, count in counts)
    yield "_count", labels, upto[-1]


def _gauges(quotas: Iterable[usage.Quota]) -> Iterator[_Family]:
    rows = [({"scope": each.scope, "limit": each.limit, "unit": each.unit}, each) for each in quotas]
    reset = "When a limit's period ends, or the oldest request in its window leaves."
    for name, description, field in (
        ("used", "How much of a limit is used now.", "used"),
        ("limit", "How much a limit allows.", "amount"),
        ("reset_timestamp_seconds", reset, "resets_at"),
    ):
        samples = [("", labels, getattr(each, field)) for labels, each in rows if getattr(each, field) is not None]
        yield _Family(f"biollm_quota_{name}", "gauge", description, samples)


def _scaling(config: Config) -> Iterator[_Family]:
    if not any(model.scale for model in config.models.values()):
        return
    from biollm.slurm import scaling  # takes longer than the rest

    states = {key: state for key, state in scaling.scaled(config).items() if state.looks}
    for name, description, fields in (
        ("servers", "Servers of a scaled model, and jobs that are pending or starting.", ("ready", "coming")),
        (
            "requests",
            "Requests at the servers, and those of 2 min that found none.",
            ("running", "waiting", "unserved"),
        ),
    ):
        samples = [
            ("", {"model": key, "state": field}, getattr(state.looks[-1], field))
            for key, state in states.items()
            for field in fields
        ]
        yield _Family(f"biollm_scaling_{name}", "gauge", description, samples)
    decisions = [("", {"model": key, "decision": state.line}, 1.0) for key, state in states.items()]
    yield _Family("biollm_scaling_decision", "gauge", "The last decision about a scaled model.", decisions)


def _lines(family: _Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help}"
    yield f"# TYPE {family.name} {family.kind}"
    for suffix, labels, value in family.samples:
        inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
        yield f"{family.name}{suffix}{{{inside}}} {value:.15g}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
