"""Usage: sums, percentiles against numpy, the roll-up, prune and merge, tags, money, quotas, GPU hours, the command."""

from __future__ import annotations

import csv
import io
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from behaviours import HTTP_404, Behaviour
from conftest import Ran
from provider import Loopback

from biollm._runtime import ledger
from biollm.client import Client, get_model_client
from biollm.config import Config, load_config
from biollm.config.paths import biollm_dir
from biollm.errors import UsageError
from biollm.ledger import Claim, Ledger, Record, history
from biollm.monitoring import metrics, usage
from biollm.monitoring.usage import Report
from biollm.routing.pricing import price_map

HOUR = 3600.0
NOON = 1_795_003_200.0  # an hour's first second

OK = Record(NOON, "r", "first/small", "first", "default", "small", "ok", ms=100.0, prompt_tokens=10,
            completion_tokens=5, cost_usd=0.5, order=1)  # fmt: skip


def numbered(records: Iterable[Record]) -> list[Record]:
    return [replace(record, request=f"r{number}") for number, record in enumerate(records)]


def wrote(folder: Path, records: Iterable[Record]) -> Ledger:
    ledger = Ledger(folder)
    for record in records:
        ledger.finish(None, "", record)
    ledger._process().history.flush(60)  # the ledger's own gives up after 2 s
    return ledger


def ask(
    ledger: Ledger, by: Any = "provider", since: float = NOON - HOUR, until: float = NOON + 99 * HOUR, **more: Any
) -> Report:
    return usage.report(Config(), ledger, since, until, by, **more)


def latencies(ledger: Ledger, exact: int) -> list[float]:
    if not exact:
        history.roll(ledger)
    total = ask(ledger, exact=exact).total
    return [total.p50_ms or 0, total.p95_ms or 0, total.p99_ms or 0]


# --- Sums --------------------------------------------------------------------------------------------------------

FAILED = replace(OK, outcome="failed", reason="HTTP 429: slow down", status=429, prompt_tokens=0, completion_tokens=0,
                 cost_usd=None)  # fmt: skip
SECOND = replace(OK, provider="second", deployment="second/small", order=2)


def test_nothing_is_an_empty_report(tmp_path: Path) -> None:
    report = ask(Ledger(tmp_path))
    assert (report.rows, report.exact, report.total) == ((), True, usage.Row(name="total"))


@pytest.mark.parametrize("exact", [history.EXACT, 0], ids=["from attempts", "rolled up"])
def test_a_request_that_the_second_answers_is_one_request(tmp_path: Path, exact: int) -> None:
    ledger = wrote(tmp_path, [replace(OK, request="a"), replace(FAILED, request="b"), replace(SECOND, request="b")])
    if not exact:
        history.roll(ledger)
    report = ask(ledger, exact=exact)
    rows = {row.name: row for row in report.rows}
    assert (rows["first"].requests, rows["first"].errors, rows["first"].error_rate) == (2, 1, 0.5)
    assert (rows["second"].requests, rows["second"].errors, rows["second"].fallback_rate) == (1, 0, 1.0)
    total = report.total
    assert (total.requests, total.errors, total.fallback_rate) == (2, 0, 0.5)
    assert (total.prompt_tokens, total.completion_tokens, total.cost_usd) == (20, 10, 1.0)
    assert (total.fallbacks, total.failures) == ({"HTTP 429": 1}, {"HTTP 429": 1})


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("limited: 15/min used by first/default, frees in 12 s", "quota"),
        ("limited: HTTP 500: broken", "cooling"),
        ("skipped: no key: set FIRST_KEY", "no key"),
        ("skipped: no server is up: biollm up small", "no server"),
        ("skipped: does not support tools", "unfit"),
        ("failed: HTTP 503: busy", "HTTP 503"),
        ("failed: no answer within 60 s", "timeout"),
        ("failed: the connection was refused", "connection"),
        ("failed: the response has no content and no tool call", "bad answer"),
    ],
)
def test_fallbacks_say_what_kept_the_first_rung(tmp_path: Path, reason: str, kind: str) -> None:
    assert ask(wrote(tmp_path, [replace(SECOND, reason=reason)])).total.fallbacks == {kind: 1}


def test_a_later_rung_that_was_asked_for_by_name_is_no_fallback(tmp_path: Path) -> None:
    assert ask(wrote(tmp_path, [SECOND])).total.fallback_rate == 0


def test_requests_nobody_answered_are_errors_and_cancelled_ones_are_not(tmp_path: Path) -> None:
    lost = [replace(FAILED, request="a"), replace(FAILED, request="a", provider="second")]
    total = ask(wrote(tmp_path, [*lost, replace(FAILED, request="b", outcome="cancelled")])).total
    assert (total.requests, total.errors, total.p50_ms) == (2, 1, None)


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("provider", ["first", "second"]),
        ("account", ["first/default", "second/default"]),
        ("model", ["small"]),
        ("day", ["2026-11-18", "2026-11-19"]),
        ("hour", ["2026-11-18 12:00", "2026-11-19 12:00"]),
        ("tag", ["(none)", "agent=a", "user=u"]),
    ],
)
@pytest.mark.parametrize("exact", [history.EXACT, 0], ids=["from attempts", "rolled up"])
def test_rows_by(tmp_path: Path, by: str, names: list[str], exact: int) -> None:
    tagged = replace(SECOND, at=NOON + 24 * HOUR, tags={"agent": "a", "user": "u"})
    ledger = wrote(tmp_path, numbered([OK, OK, tagged]))
    if not exact:
        history.roll(ledger)
    report = ask(ledger, by, exact=exact)
    assert sorted(row.name for row in report.rows) == names
    assert report.total.requests == 3


def test_a_window_is_cut_at_the_second_rolled_up_or_not(tmp_path: Path) -> None:
    ledger = wrote(tmp_path, numbered(replace(OK, at=NOON + 600 * step) for step in range(60)))
    history.roll(ledger)
    for since, until in ((NOON + 601, NOON + 5 * HOUR + 1), (NOON + 1, NOON + 700), (NOON, NOON + HOUR)):
        few, rolled = (ask(ledger, since=since, until=until, exact=exact) for exact in (history.EXACT, 0))
        assert few.total.requests == rolled.total.requests == len([*ledger.history(since, until)])


def test_what_the_client_does_is_what_is_reported(net: Loopback, waterfall: Callable[..., Path], state: Path) -> None:
    first, second = net.serve(), net.serve()
    waterfall(first={"base_url": first.url, "rate_limit": "1/hour"}, second=second)
    with Client(tags={"agent": "tester"}) as client:
        client.complete("hi")
        client.complete("hi")
        client.complete("hi", provider="second")
    ledger().flush()
    report = usage.report(load_config(), Ledger(state), by="tag")
    assert [row.name for row in report.rows] == ["agent=tester"]
    assert (report.total.requests, report.total.fallbacks) == (3, {"quota": 1})
    assert report.total.p50_ms and report.quotas[0].left == 0


# --- Percentiles -------------------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(7)
SHAPES = {
    "log-normal": RANDOM.lognormal(6, 1, 7000),
    "uniform": RANDOM.uniform(1, 60_000, 7000),
    "two peaks": np.concatenate([RANDOM.normal(300, 20, 4000), RANDOM.normal(9000, 500, 3000)]),
    "one": np.array([123.4]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_percentiles_are_numpys(tmp_path: Path, shape: str) -> None:
    values = SHAPES[shape]
    ledger = wrote(tmp_path, numbered(replace(OK, at=NOON + n, ms=float(ms)) for n, ms in enumerate(values)))
    expected = [float(each) for each in np.percentile(values, [50, 95, 99])]
    assert latencies(ledger, history.EXACT) == pytest.approx(expected, rel=1e-12)
    assert latencies(ledger, 0) == pytest.approx(expected, rel=0.02)
    assert (ask(ledger).exact, ask(ledger, exact=6).exact) == (True, len(values) <= 6)


def test_buckets_are_within_one_percent_of_all_they_hold() -> None:
    for ms in (0.011, 0.5, 1.0, 17.3, 999.0, 3.6e6, 1e8):
        assert history.middle(history.bucket(ms)) == pytest.approx(ms, rel=0.0101)


# --- The roll-up -------------------------------------------------------------------------------------------------


def test_late_records_are_added_to_their_hour(tmp_path: Path) -> None:
    ledger = wrote(tmp_path, numbered(replace(OK, at=NOON + HOUR * n) for n in range(5)))
    history.roll(ledger)
    late = replace(OK, request="late", at=NOON + HOUR, ms=900.0, tags={"a": "ü"})
    wrote(tmp_path, [late])
    before = ask(ledger, "hour", exact=0)  # read beside the roll-up
    history.roll(ledger)
    after = ask(ledger, "hour", exact=0)
    assert before == replace(after, since=before.since) and after.rows[1].requests == 2
    history.roll(ledger)
    assert ask(ledger, "hour", exact=0) == after


def test_a_request_that_lies_across_two_roll_ups_is_one(tmp_path: Path) -> None:
    ledger = wrote(tmp_path, [FAILED])
    history.roll(ledger)
    wrote(tmp_path, [SECOND])
    for _ in range(2):  # read beside the roll-up, and from it
        total = ask(ledger, exact=0).total
        assert (total.requests, total.fallbacks) == (1, {"HTTP 429": 1})
        history.roll(ledger)


def test_pruning_keeps_the_sums_and_says_that_percentiles_are_not_exact(tmp_path: Path) -> None:
    ledger = wrote(tmp_path, numbered(replace(OK, at=NOON + HOUR * n) for n in range(6)))
    before = ask(ledger, "hour")
    assert history.prune(ledger, NOON + 3 * HOUR) == 3
    assert len([*ledger.history()]) == 3
    after = ask(ledger, "hour")
    assert (before.exact, after.exact) == (True, False)
    assert [(row.name, row.requests) for row in after.rows] == [(row.name, row.requests) for row in before.rows]
    assert ask(ledger, since=NOON + 3 * HOUR).exact
    assert history.prune(ledger, NOON + 99 * HOUR) == 3
    wrote(tmp_path, [replace(OK, request="new", at=NOON + 9 * HOUR)])  # its id is one that was there before
    assert ask(ledger).total.requests == 7


def test_merging_adds_each_record_once(tmp_path: Path) -> None:
    here = wrote(tmp_path / "here", [replace(OK, request="a")])
    wrote(tmp_path / "there", [replace(OK, request="a"), replace(OK, request="b", tags={"host": "x"})]).close()
    other = tmp_path / "there" / "history.db"
    history.roll(here)
    assert [history.merge(here, other), history.merge(here, other)] == [1, 0]
    assert {row.name: row.requests for row in ask(here, "tag", exact=0).rows} == {"(none)": 1, "host=x": 1}
    history.prune(here, NOON + HOUR)
    assert history.merge(here, other) == 0  # they may have been counted


@pytest.mark.parametrize("content", [None, "no database"])
def test_merging_something_else_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "other.db").write_text(content)
    with pytest.raises(UsageError):
        history.merge(Ledger(tmp_path), tmp_path / "other.db")


# --- Money and quotas --------------------------------------------------------------------------------------------


def test_cost_avoided_is_at_the_reference_models_price(tmp_path: Path, waterfall: Callable[..., Path]) -> None:
    waterfall({"costs": {"reference_model": "gpt-4o"}}, first="https://x.test/v1")
    free = replace(OK, at=time.time(), prompt_tokens=1_000_000, completion_tokens=100_000, cost_usd=0.0)
    report = usage.report(load_config(), wrote(tmp_path, [free]))
    price = price_map()["gpt-4o"]
    expected = 1_000_000 * price["input_cost_per_token"] + 100_000 * price["output_cost_per_token"]  # type: ignore
    assert report.total.cost_avoided_usd == pytest.approx(expected)


@pytest.mark.parametrize("exact", [100, 0])
def test_an_unknown_price_is_none_and_neither_nothing_nor_avoided(
    tmp_path: Path, waterfall: Callable[..., Path], exact: int
) -> None:
    waterfall({"costs": {"reference_model": "gpt-4o"}}, first="https://x.test/v1")
    known = replace(OK, prompt_tokens=1_000_000, completion_tokens=100_000, cost_usd=0.25)
    odd = replace(known, provider="odd", cost_usd=None, request="odd")
    ledger = wrote(tmp_path, [known, replace(odd, outcome="failed", estimated=True), replace(FAILED, provider="odd")])
    if not exact:
        history.roll(ledger)
    found = usage.report(load_config(), ledger, NOON - HOUR, NOON + HOUR, exact=exact)
    rows = {row.name: row for row in (*found.rows, found.total)}
    assert [(rows[name].cost_usd, rows[name].unpriced, rows[name].estimated) for name in ("first", "odd", "total")] == [
        (0.25, 0, 0), (None, 1, 1), (0.25, 1, 1),
    ]  # fmt: skip
    assert rows["odd"].cost_avoided_usd is None
    assert rows["total"].cost_avoided_usd == rows["first"].cost_avoided_usd == pytest.approx(2.5 + 1 - 0.25)
    assert (rows["odd"].prompt_tokens, rows["total"].completion_tokens) == (1_000_000, 200_000)


def test_an_unknown_price_is_no_sample_of_the_cost_metric(tmp_path: Path, waterfall: Callable[..., Path]) -> None:
    waterfall(first="https://x.test/v1")
    odd = replace(OK, provider="odd", cost_usd=None)
    ledger = wrote(tmp_path, numbered([OK, odd, replace(FAILED, provider="odd")]))
    lines = [line for line in metrics.text(load_config(), ledger).splitlines() if "odd" in line or "first/" in line]
    told = {line.split("{")[0]: line.split()[-1] for line in lines if "odd" in line}
    assert "biollm_cost_usd_total" not in told
    assert told["biollm_unpriced_requests_total"] == "1"


# As the tables were before they had a column for estimates and unknown prices.
OLD = """
CREATE TABLE attempt (id INTEGER PRIMARY KEY, "at", "request", "deployment", "provider", "account", "model", "outcome",
    "reason", "status", "ms", "ttft_ms", "prompt_tokens", "completion_tokens", "cost_usd", "order", "degraded", "tags");
CREATE INDEX attempt_at ON attempt (at);
CREATE TABLE rollup (
    hour INTEGER, provider TEXT, account TEXT, model TEXT, tags TEXT, outcome TEXT, why TEXT, attempts INTEGER,
    requests INTEGER, prompt INTEGER, completion INTEGER, cost REAL, ms BLOB, ttft BLOB,
    PRIMARY KEY (hour, provider, account, model, tags, outcome, why)) WITHOUT ROWID;
CREATE TABLE rolled (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER, pruned REAL);
INSERT INTO rolled VALUES (1, 1, 0);
"""


def earlier(folder: Path) -> Path:
    """Make the history.db of an earlier version: an answer without a price, and its hour, in which it costs 0."""
    folder.mkdir(exist_ok=True)
    values = [getattr(replace(OK, cost_usd=None), each.name) for each in fields(Record) if each.name != "estimated"]
    with closing(sqlite3.connect(folder / "history.db")) as db:
        db.executescript(OLD)
        db.execute(f"INSERT INTO attempt VALUES (1, {', '.join('?' * 17)})", [*values[:-1], "{}"])
        hour = (NOON // HOUR, "first", "default", "small", "{}", "ok", "", 1, 1, 10, 5, 0.0, b"\xff\x01", b"")
        db.execute(f"INSERT INTO rollup VALUES ({', '.join('?' * 14)})", hour)
        db.commit()
    return folder


def test_an_earlier_versions_history_is_read_as_it_is(tmp_path: Path) -> None:
    ledger = Ledger(earlier(tmp_path))
    before = (tmp_path / "history.db").read_bytes()
    assert [(each.prompt_tokens, each.estimated, each.degraded) for each in ledger.history()] == [(10, False, False)]
    for exact in (100, 0):
        total = ask(ledger, exact=exact).total
        assert (total.requests, total.prompt_tokens, total.estimated) == (1, 10, 0)
    assert (tmp_path / "history.db").read_bytes() == before


def test_an_earlier_versions_history_is_written_on_and_its_unknown_prices_are_found(tmp_path: Path) -> None:
    ledger = wrote(earlier(tmp_path), [replace(OK, request="new", estimated=True)])
    assert [each.estimated for each in ledger.history()] == [False, True]
    history.roll(ledger)
    total = ask(ledger, exact=0).total
    assert (total.requests, total.unpriced, total.estimated, total.cost_usd) == (2, 1, 1, 0.5)


def test_an_earlier_versions_history_is_merged(tmp_path: Path) -> None:
    here = wrote(tmp_path / "here", [replace(OK, request="new", estimated=True)])
    assert history.merge(here, earlier(tmp_path / "there") / "history.db") == 1
    assert sorted((each.request, each.estimated) for each in here.history()) == [("new", True), ("r", False)]


async def _spend(ledger: Ledger, config: Config, usd: float) -> None:
    account = config.providers[0].accounts[0]
    claim = Claim("first/default", account.limits)
    ledger.finish(await ledger.reserve(claim), claim.scope, replace(OK, at=time.time(), cost_usd=usd))  # type: ignore[arg-type]


def test_quotas_say_what_is_left_and_on_which_day_it_ends(tmp_path: Path, waterfall: Callable[..., Path]) -> None:
    import asyncio

    entry = {
        "base_url": "https://x.test/v1",
        "rate_limit": "10/min",
        "budget": "10 USD/month",
        "token_budget": "1M/day",
    }
    waterfall(first=entry)
    config, ledger = load_config(), Ledger(tmp_path)
    asyncio.run(_spend(ledger, config, 9.99))
    ledger.flush()
    report = usage.report(config, ledger)
    by_limit = {quota.limit: quota for quota in report.quotas}
    assert (by_limit["10/min"].used, by_limit["10/min"].left, by_limit["10/min"].exhausted_at) == (1, 9, None)
    (budget,) = report.budgets
    assert (budget.unit, budget.used, budget.left) == ("usd", 9.99, pytest.approx(0.01))
    assert budget.resets_at and budget.exhausted_at and time.time() <= budget.exhausted_at < budget.resets_at
    assert by_limit["1M tokens/day"].used == 15


def test_local_models_cost_their_jobs_gpu_hours(tmp_path: Path, waterfall: Callable[..., Path], state: Path) -> None:
    vllm = {"type": "local", "models": ["qwen-coder-32b"]}
    model = {"hf_id": "a/b", "type": "local"}
    folder = waterfall({"costs": {"gpu_hour_usd": 2, "reference_model": "gpt-4o"}}, vllm=vllm)
    (folder / "models.yaml").write_text(json.dumps({"models": {"qwen-coder-32b": model}}))
    config, now = load_config(), time.time()
    jobs = biollm_dir(config.cluster) / "jobs"
    jobs.mkdir(parents=True)
    kept = {"job": "7", "models": ["qwen-coder-32b"], "gpus": 4, "walltime": 3600, "log": "x", "chain": "", "link": 1,
            "links": 1, "nodes": 1, "cluster": config.cluster.name}  # fmt: skip
    (jobs / "t.json").write_text(json.dumps(kept))
    said = {"restart": 0, "model": "qwen-coder-32b"}
    events = [
        {"at": now - 7200, "state": "starting", "reason": ""},
        {"at": now - 3600, "state": "stopped", "reason": "idle"},
    ]
    (jobs / "t.events").write_text("".join(json.dumps(said | event) + "\n" for event in events))
    os.utime(jobs / "t.events", (now - 3600, now - 3600))
    answer = replace(
        OK, at=now - 5000, provider="vllm", model="qwen-coder-32b", prompt_tokens=3000, completion_tokens=1000
    )
    (local,) = usage.report(config, wrote(state, [answer])).local
    assert (local.model, local.tokens) == ("qwen-coder-32b", 4000)
    assert local.gpu_hours == pytest.approx(4.0, rel=0.01)  # 4 GPUs for the hour between its events
    assert local.cost_usd == pytest.approx(8.0, rel=0.01)
    assert local.per_million_usd == pytest.approx(2000, rel=0.01)
    assert local.reference_per_million_usd
    assert usage.report(config, Ledger(state), now - 1800).local == ()  # it was over before then
    unknown = replace(config, costs=config.costs.model_copy(update={"gpu_hour_usd": None}))
    (local,) = usage.report(unknown, Ledger(state)).local
    assert (local.cost_usd, local.per_million_usd) == (None, None)
    assert Config().costs.gpu_hour_usd is None, "unless it is set"


# --- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def used(state: Path, waterfall: Callable[..., Path]) -> Path:
    waterfall(first="https://x.test/v1", second="https://y.test/v1")
    now = time.time()
    wrote(
        state, numbered([replace(OK, at=now - 60), replace(SECOND, at=now - 60, reason="skipped: no key: set K")])
    ).close()
    return state


def test_the_table_names_the_fallback(used: Path, biollm: Callable[..., Any]) -> None:
    ran = biollm("usage")
    assert (ran.code, ran.err) == (0, "")
    assert "percentiles are exact" in ran.out and "Fallbacks: no key 1" in ran.out
    assert biollm("usage", "--by", "day").out.count("█" * 40) == 1


def test_rows_of_attempts_add_up_and_requests_are_named_apart(
    net: Loopback, waterfall: Callable[..., Path], biollm: Callable[..., Any]
) -> None:
    waterfall(first=net.serve(then=HTTP_404), second=net.serve())
    get_model_client(sender="direct").complete("why?")
    ledger().flush()

    def table(by: str) -> list[list[str]]:
        return [line.split()[:3] for line in biollm("usage", "--by", by).out.splitlines()[2:]]

    rows = table("provider")
    assert rows[0] == ["provider", "attempts", "errors"]
    assert sorted(rows[1:3]) == [["first", "1", "100.0%"], ["second", "1", "0.0%"]]
    assert rows[3] == ["total", "2", "50.0%"]
    assert "\nRequests: 1, of which 0 had no answer.\n" in biollm("usage").out
    rows = table("day")
    assert (rows[0][1], rows[2]) == ("requests", ["total", "1", "0.0%"])


def test_json_and_csv_hold_the_same(used: Path, biollm: Callable[..., Any]) -> None:
    rows = biollm("usage", "--json", "--since", "1h").json["rows"]
    table = list(csv.DictReader(io.StringIO(biollm("usage", "--csv", "--since", "1h").out)))
    assert [row["name"] for row in rows] == [row["provider"] for row in table] == ["first", "second"]
    assert [float(row["p50_ms"]) for row in table] == [row["p50_ms"] for row in rows] == [100, 100]


def test_json_gives_times_in_iso_8601_utc(
    net: Loopback, waterfall: Callable[..., Path], biollm: Callable[..., Any]
) -> None:
    waterfall(first={"base_url": net.serve().url, "rate_limit": "9/day", "budget": "1 USD/month"})
    Client().complete("why?")
    told = biollm("usage", "--json", "--since", "2026-11-17", "--until", "2026-11-18T12:00+01:00").json
    assert (told["since"], told["until"]) == ("2026-11-17T00:00:00+00:00", "2026-11-18T11:00:00+00:00")
    (day, _), (month,) = told["quotas"], told["budgets"]
    assert day["exhausted_at"] is None or day["exhausted_at"][10] == "T"
    assert [each["resets_at"][10:] for each in (day, month)] == ["T00:00:00+00:00"] * 2


@pytest.mark.parametrize(
    "argv",
    [
        ("--since", "yesterday"),
        ("--by", "colour"),
        ("--prune", "old"),
        ("--merge", "/nowhere.db"),
        ("--since", "2099-01-01"),
        ("--since", "1d", "--until", "2d"),
        ("--csv", "--json"),
        ("--json", "--prometheus"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(used: Path, biollm: Callable[..., Any], argv: tuple[str, ...]) -> None:
    ran = biollm("usage", *argv)
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith("biollm: ")


def test_prune_and_merge_from_the_command_line(used: Path, tmp_path: Path, biollm: Callable[..., Any]) -> None:
    wrote(tmp_path / "other", [replace(OK, request="x", at=time.time() - 60)]).close()
    assert "1 record added" in biollm("usage", "--merge", tmp_path / "other" / "history.db").out
    assert "0 records removed" in biollm("usage", "--prune", "90d").out
    assert biollm("usage", "--json").json["total"]["requests"] == 3
    assert "0 records removed" not in biollm("usage", "--prune", "0d").out
    assert biollm("usage", "--json").json["total"]["requests"] == 3, "the sums of an hour that has not ended stay too"


@pytest.mark.parametrize(
    ("written", "epoch"),
    [("7d", NOON - 7 * 86400), ("90min", NOON - 5400), ("2w", NOON - 14 * 86400), ("2026-11-18T11:00", NOON - HOUR),
     ("2026-11-18T12:00+01:00", NOON - HOUR)],
)  # fmt: skip
def test_times(written: str, epoch: float) -> None:
    assert usage.moment(written, NOON) == epoch


def test_what_stored_answers_saved_is_a_sum_of_its_own(
    net: Loopback, waterfall: Callable[..., Path], paid: Callable[..., dict[str, Any]], biollm: Callable[..., Ran]
) -> None:
    server = net.serve(then=Behaviour(usage={"prompt_tokens": 800, "completion_tokens": 200, "total_tokens": 1000}))
    prices = {"costs": {"per_million_tokens": {"copilot": 50}}}
    waterfall(prices, copilot=paid(server, "copilot"))
    client = get_model_client(sender="direct", cache=True)
    for agent in ("a", "b", "b"):
        client.complete("why?", tags={"agent": agent})
    ledger().flush()
    found = usage.report(load_config(), ledger(), by="tag")
    rows = {row.name: (row.requests, row.errors, row.cached, row.saved_tokens, row.saved_usd) for row in found.rows}
    assert rows == {"agent=a": (1, 0, 0, 0, None), "agent=b": (2, 0, 2, 2000, pytest.approx(0.1))}
    total = found.total
    assert (total.requests, total.prompt_tokens, total.completion_tokens, total.cost_usd) == (3, 800, 200, 0.05)
    assert (total.unpriced, total.fallbacks, total.failures) == (0, {}, {})
    (row,) = usage.report(load_config(), ledger(), by="model").rows
    assert (row.requests, row.cached, row.p50_ms is not None) == (1, 2, True)
    assert "\nStored answers: 2, which saved 2k tokens and 0.10 USD.\n" in biollm("usage").out
    lines = biollm("usage", "--prometheus").out.splitlines()
    assert [
        line.rpartition(" ")[2]
        for line in lines
        if line.startswith(
            ("biollm_cached_requests_total{", "biollm_saved_tokens_total{", "biollm_saved_cost_usd_total{")
        )
    ] == ["2", "2000", "0.1"]
    assert [line.rpartition(" ")[2] for line in lines if line.startswith("biollm_requests_total{")] == ["1"]
