"""Limits of tokens and dollars when requests overlap: what each reserves, and by how much a limit can be passed."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import Behaviour
from provider import Loopback

from biollm._runtime import ledger as shared_ledger
from biollm.client import get_model_client
from biollm.config import Limit, load_config
from biollm.ledger import Claim, Ledger, Record, Refused
from biollm.monitoring.snapshot import Collector

Write = Callable[..., Path]
NOON = 1_795_003_200.0
SCOPE = "first/default"


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tokens(amount: float, unit: str = "min") -> Limit:
    return Limit("tokens", amount, unit)  # type: ignore[arg-type]


def reserve(ledger: Ledger, limit: Limit, expected: float = 0) -> int | Refused:
    usd = {"usd": expected} if limit.kind == "usd" else {"tokens": expected}
    return asyncio.run(ledger.reserve(Claim(SCOPE, (limit,), **usd)))


def finish(ledger: Ledger, reservation: int | Refused | None, used: int, at: float = NOON, usd: float = 0.0) -> None:
    assert not isinstance(reservation, Refused)
    one = Record(at, "r", "first/m", "first", "default", "m", "ok", prompt_tokens=used, cost_usd=usd)
    ledger.finish(reservation, SCOPE, one)


def used(ledger: Ledger, limit: Limit) -> float:
    ledger.flush()
    return ledger.used(SCOPE, (limit,))[0][1]


# --- The ledger -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [tokens(1000), tokens(1000, "day"), tokens(1000, "month"), Limit("usd", 1000, "day")])
def test_what_is_reserved_counts_until_the_request_ends(ledger: Ledger, limit: Limit) -> None:
    first, second = reserve(ledger, limit, 400), reserve(ledger, limit, 400)
    refused = reserve(ledger, limit, 400)
    assert used(ledger, limit) == 800
    assert isinstance(refused, Refused)
    assert refused.until == NOON + 1, "a request under way may use less than it reserved"
    assert refused.reason.startswith(f"{limit} used or reserved by first/default")
    finish(ledger, first, 10, usd=10)
    assert used(ledger, limit) == 410
    assert isinstance(reserve(ledger, limit, 400), int)
    finish(ledger, second, 995, usd=995)  # more than it reserved
    assert used(ledger, limit) == 1405
    refused = reserve(ledger, limit, 1)
    assert isinstance(refused, Refused)
    assert refused.until > NOON + 1


def test_a_request_that_needs_more_than_is_left_blocks_no_smaller_one(ledger: Ledger, clock: Clock) -> None:
    limit = tokens(1000)
    finish(ledger, reserve(ledger, limit, 700), 700)
    clock.now += 10
    refused = reserve(ledger, limit, 400)
    assert isinstance(refused, Refused)
    assert refused.until == NOON + 61
    assert ledger.blocked() == {}
    assert isinstance(reserve(ledger, limit, 300), int)


def test_a_request_larger_than_the_whole_limit_goes_when_nothing_else_counts(ledger: Ledger, clock: Clock) -> None:
    limit = tokens(1000)
    finish(ledger, reserve(ledger, limit, 64_000), 500)
    assert isinstance(reserve(ledger, limit, 64_000), Refused)
    clock.now += 62
    assert isinstance(reserve(ledger, limit, 64_000), int)


@pytest.mark.parametrize(("limit", "seconds"), [(tokens(1000), 62), (tokens(1000, "day"), 12 * 3600)])
def test_what_a_dead_process_reserved_counts_as_used_and_ends_with_its_period(
    ledger: Ledger, clock: Clock, limit: Limit, seconds: float
) -> None:
    reserve(ledger, limit, 900)
    assert isinstance(reserve(ledger, limit, 200), Refused)
    clock.now += seconds
    assert isinstance(reserve(ledger, limit, 200), int)


def test_what_a_dead_process_reserved_stays_used_in_its_month(ledger: Ledger, clock: Clock) -> None:
    limit = tokens(1000, "month")
    reserve(ledger, limit, 900)
    clock.now += 2 * 86400  # its row has been removed since
    finish(ledger, reserve(ledger, limit, 100), 50, at=clock.now)
    assert used(ledger, limit) == 950


OLD = """
CREATE TABLE sent (id INTEGER PRIMARY KEY, scope TEXT NOT NULL, at REAL NOT NULL, tokens, usd);
CREATE TABLE total (
    scope TEXT NOT NULL, start REAL NOT NULL, until REAL NOT NULL,
    requests DEFAULT 0, tokens DEFAULT 0, usd DEFAULT 0, PRIMARY KEY (scope, start, until)) WITHOUT ROWID;
CREATE TABLE cooling (key TEXT PRIMARY KEY, until REAL NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
"""


def test_an_earlier_versions_quotas_are_read_and_counted_on(tmp_path: Path, clock: Clock) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "quotas.db")) as db:
        db.executescript(OLD)
        db.execute("INSERT INTO sent VALUES (1, ?, ?, 300, 0.1)", (SCOPE, NOON - 5))
        db.commit()
    with contextlib.closing(Ledger(tmp_path, clock=clock)) as ledger:
        assert used(ledger, tokens(1000)) == 300
        assert isinstance(reserve(ledger, tokens(1000), 600), int)
        assert used(ledger, tokens(1000)) == 900


def test_an_answer_is_expected_to_be_as_long_as_the_last_ones_were(tmp_path: Path) -> None:
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        assert ledger.typical("first/m") == 1000
        for count in [*range(1, 41), 9000]:
            answer = Record(time.time(), "r", "first/m", "first", "default", "m", "ok", completion_tokens=count)
            ledger.finish(None, SCOPE, answer)
        assert ledger.typical("first/m") == 37
    with contextlib.closing(Ledger(tmp_path)) as later:
        later.refresh()
        assert (later.typical("first/m"), later.typical("other/m")) == (37, 1000)


# --- Eight processes ------------------------------------------------------------------------------------------------

AMOUNT, EXPECTED, MOST = 20_000, 300, 360  # tokens: of the limit, expected and used at most by a request


def busy(folder: Path, seed: int, start: Any, out: Any) -> None:
    """Send 50 requests at once; each tries again until it may go, or for 2 s."""
    ledger, dice = Ledger(folder), random.Random(seed)
    start.wait()  # for the imports of all processes, which would keep the writers from the processors

    async def one() -> bool:
        claim, until = Claim(SCOPE, (tokens(AMOUNT),), tokens=EXPECTED), time.monotonic() + 2
        while isinstance(found := await ledger.reserve(claim), Refused):
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.05)
        await asyncio.sleep(dice.uniform(0.05, 0.3))
        finish(ledger, found, dice.randint(100, MOST), at=time.time())
        return True

    async def burst() -> int:
        return sum(await asyncio.gather(*(one() for _ in range(50))))

    sent = asyncio.run(burst())
    ledger.close()
    out.put(sent)


@pytest.mark.slow
def test_eight_processes_pass_a_token_limit_by_no_more_than_their_answers_pass_what_was_expected(
    tmp_path: Path,
) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, out = spawn.Barrier(8), spawn.Queue()
    children = [spawn.Process(target=busy, args=(tmp_path, seed, start, out)) for seed in range(8)]
    for child in children:
        child.start()
    sent = sum(out.get() for _ in children)
    for child in children:
        child.join()
    counted = [record.prompt_tokens for record in Ledger(tmp_path).history()]
    assert len(counted) == sent < 400
    under_way = AMOUNT // EXPECTED  # at most, at any time
    assert AMOUNT - EXPECTED < sum(counted) <= AMOUNT + under_way * (MOST - EXPECTED)


# --- The client -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "most"),
    [({"token_limit": "2k/min"}, 2000 // 60), ({"budget": "2000 USD/month"}, 2000 // 60), ({}, 50)],
)
def test_fifty_at_once_stay_within_a_limit_and_the_next_rung_answers_the_rest(
    net: Loopback, waterfall: Write, limit: dict[str, Any], most: int
) -> None:
    stated = {"prompt_tokens": 40, "completion_tokens": 20, "total_tokens": 60}
    first, second = net.serve(then=Behaviour(usage=stated)), net.serve()
    costs = {"costs": {"per_million_tokens": {"first": 1e6}}}  # a dollar a token
    waterfall(costs, first={"base_url": first.url, **limit}, second=second)
    client = get_model_client()

    async def fifty() -> list[Any]:
        return await asyncio.gather(*(client.acomplete("hi", max_tokens=64_000) for _ in range(50)))

    answers = asyncio.run(fifty())
    assert len(first.completions) + len(second.completions) == len(answers) == 50
    assert 0 < len(first.completions) <= most
    assert client.complete("hi").provider == "first", "what was reserved and not used is free again"


def test_explain_top_and_ledger_agree_on_full(net: Loopback, waterfall: Write, state: Path) -> None:
    entry = {"base_url": net.serve().url, "token_limit": "100k/min"}
    waterfall(first=entry)
    client, config = get_model_client(), load_config()
    limit = config.providers[0].accounts[0].limits[0]
    used = 100_000 - 5_000
    finish(shared_ledger(), asyncio.run(shared_ledger().reserve(Claim(SCOPE, (limit,)))), used, at=time.time())
    shared_ledger().flush()

    def status(letters: int) -> tuple[str, str]:
        (candidate,) = client.explain("x" * letters)
        try:
            client.complete("x" * letters)
        except Exception as error:
            return candidate.status, type(error).__name__
        return candidate.status, "answered"

    assert status(30_000) == ("limited", "AllLimitedError")
    assert Collector(config, shared_ledger(), state).snapshot().candidates[0].state == "ready"
    assert status(10) == ("ready", "answered")
    finish(shared_ledger(), asyncio.run(shared_ledger().reserve(Claim(SCOPE, (limit,)))), 5_000, at=time.time())
    shared_ledger().flush()
    assert status(10) == ("limited", "AllLimitedError")
    assert Collector(config, shared_ledger(), state).snapshot().candidates[0].state == "limited"
