import asyncio
import contextlib
import fcntl
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from conftest import until

from biollm.config import Limit
from biollm.ledger import Claim, Ledger, Record, Refused, quotas
from biollm.ledger import history as _rollup
from biollm.ledger.quotas import Cooldown
from biollm.ledger.sqlite import Database, locks_are_local, on_network, read, reading

Make = Callable[..., Ledger]
NOON = 1_795_435_200.0  # 2026-11-23 12:00 UTC
SCOPE = "gemini/default"
SPAWN = multiprocessing.get_context("spawn")
both_journals = pytest.mark.parametrize("network", [False, True], ids=["wal", "rollback"])


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def per(amount: float, unit: str, kind: str = "requests", resets: str | None = None) -> Limit:
    return Limit(kind, amount, unit, resets)


def reserve(ledger: Ledger, *limits: Limit, scope: str = SCOPE, cooling: tuple[str, ...] = ()) -> int | Refused:
    return asyncio.run(ledger.reserve(Claim(scope, limits, cooling)))


def granted(answers: list[int | Refused]) -> int:
    return sum(not isinstance(answer, Refused) for answer in answers)


def record(at: float = NOON, **more: object) -> Record:
    facts = {"request": "r1", "deployment": "gemini/m", "provider": "gemini", "account": "default", "model": "m"}
    return Record(at=at, outcome="ok", **facts | more)


def rows(folder: Path, sql: str, file: str = "quotas.db") -> list[tuple]:
    with contextlib.closing(sqlite3.connect(folder / file)) as db:
        return db.execute(sql).fetchall()


# Limits


def test_a_request_limit_holds_in_every_window(ledger: Ledger, clock: Clock) -> None:
    """A window is held a second longer than it says: requests do not all take equally long to arrive."""
    sent = []
    for _ in range(400):
        if not isinstance(reserve(ledger, per(15, "min")), Refused):
            sent.append(clock.now)
        clock.now += 0.5
    assert max(sum(start <= at < start + 61 for at in sent) for start in sent) == 15
    assert len(sent) == 60  # 15 in each of the 61 s windows that 200 s touch: not one is wasted


def test_a_refusal_says_what_is_used_by_whom_and_when_it_frees(ledger: Ledger, clock: Clock) -> None:
    reserve(ledger, per(2, "min"))
    clock.now += 49
    reserve(ledger, per(2, "min"))
    assert reserve(ledger, per(2, "min")) == Refused(
        NOON + 61, "2/min used by gemini/default, frees in 12 s", "scope:gemini/default"
    )
    assert ledger.blocked() == {
        "scope:gemini/default": Cooldown(NOON + 61, "2/min used by gemini/default", stated=True)
    }
    clock.now = NOON + 61
    assert ledger.blocked() == {}
    assert isinstance(reserve(ledger, per(2, "min")), int)


@pytest.mark.parametrize(
    ("limit", "uses", "frees"),
    [
        (per(3, "s"), [(0, 0.0)] * 3, 1.1),
        (per(3, "hour"), [(0, 0.0)] * 3, 3601),
        (per(2.4, "min"), [(0, 0.0)] * 2, 61),  # a share of 12/min: never more than the share
        (per(1000, "min", "tokens"), [(600, 0.0), (400, 0.0)], 61),
        (per(1000, "hour", "tokens"), [(999, 0.0), (5000, 0.0)], 3601),
        (per(0.5, "hour", "usd"), [(1, 0.3), (1, 0.2)], 3601),
        (per(3, "day"), [(0, 0.0)] * 3, 12 * 3600),
        (per(3, "month"), [(0, 0.0)] * 3, 7.5 * 86400),
        (per(1000, "day", "tokens"), [(600, 0.0), (400, 0.0)], 12 * 3600),
        (per(30e6, "month", "tokens"), [(30_000_000, 0.0)], 7.5 * 86400),
        (per(10, "month", "usd"), [(1, 4.0), (1, 6.0)], 7.5 * 86400),
        (per(1, "day", resets="00:00 America/Los_Angeles"), [(0, 0.0)], 20 * 3600),
    ],
    ids=str,
)
def test_a_limit_is_full_when_used_and_frees(
    make: Make, clock: Clock, limit: Limit, uses: list[tuple[int, float]], frees: float
) -> None:
    with contextlib.closing(make()) as ledger:
        for tokens, cost in uses:
            reservation = reserve(ledger, limit)
            assert isinstance(reservation, int)
            ledger.finish(
                reservation,
                SCOPE,
                record(prompt_tokens=tokens - tokens // 3, completion_tokens=tokens // 3, cost_usd=cost),
            )
        refused = reserve(ledger, limit)
        assert isinstance(refused, Refused)
        assert refused.until == pytest.approx(NOON + frees)
        clock.now = refused.until
        assert isinstance(reserve(ledger, limit), int)


def test_the_request_that_must_leave_first_decides_when_a_token_limit_frees(ledger: Ledger, clock: Clock) -> None:
    limit = per(1000, "min", "tokens")
    for tokens in (100, 800, 200):
        ledger.finish(reserve(ledger, limit), SCOPE, record(prompt_tokens=tokens))
        clock.now += 10
    assert reserve(ledger, limit).until == NOON + 10 + 61  # 100 alone would leave 1000 used


def test_every_limit_is_asked_before_anything_counts_and_the_last_to_free_is_named(ledger: Ledger) -> None:
    limits = per(1, "min"), per(1, "day")
    reserve(ledger, *limits)
    assert reserve(ledger, *limits).reason == "1/day used by gemini/default, frees in 12 h"
    assert [used for _, used, _ in ledger.used(SCOPE, limits)] == [1, 1]


def test_scopes_do_not_share_limits(ledger: Ledger) -> None:
    answers = [reserve(ledger, per(1, "min"), scope=scope) for scope in ("a", "a", "b", "a:m", "b")]
    assert [isinstance(answer, Refused) for answer in answers] == [False, True, False, False, True]


@pytest.mark.parametrize(
    ("unit", "resets", "now", "start", "end"),
    [
        ("day", "00:00 Europe/Berlin", "2026-03-29 12:00", "2026-03-29 00:00", "2026-03-30 00:00"),  # 23 h
        ("day", "00:00 Europe/Berlin", "2026-10-25 12:00", "2026-10-25 00:00", "2026-10-26 00:00"),  # 25 h
        ("day", "02:30 Europe/Berlin", "2026-03-29 01:00", "2026-03-28 02:30", "2026-03-29 03:30"),  # no 02:30
        ("day", "09:00 Asia/Tokyo", "2026-11-23 08:59", "2026-11-22 09:00", "2026-11-23 09:00"),
        ("month", "00:00 America/Los_Angeles", "2026-11-30 23:59", "2026-11-01 00:00", "2026-12-01 00:00"),
        ("month", "06:00 Europe/Berlin", "2026-03-01 05:00", "2026-02-01 06:00", "2026-03-01 06:00"),
        ("month", "00:00 UTC", "2028-02-29 12:00", "2028-02-01 00:00", "2028-03-01 00:00"),
        ("month", "00:00 UTC", "2026-12-31 23:59", "2026-12-01 00:00", "2027-01-01 00:00"),
    ],
)
def test_days_and_months_begin_when_the_provider_says(
    ledger: Ledger, clock: Clock, unit: str, resets: str, now: str, start: str, end: str
) -> None:
    def at(text: str) -> float:
        return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(resets.split()[1])).timestamp()

    limit = per(1, unit, resets=resets)
    clock.now = at(start) - 1
    reserve(ledger, limit)  # counts for the period before
    clock.now = at(now)
    assert ledger.used(SCOPE, [limit]) == [(limit, 0, at(end))]
    assert isinstance(reserve(ledger, limit), int)
    assert reserve(ledger, limit).until == at(end)


def test_an_attempt_counts_in_the_periods_in_which_it_was_sent(ledger: Ledger, clock: Clock) -> None:
    limits = per(100, "day", "tokens"), per(100, "month", "tokens")
    clock.now = NOON + 12 * 3600 - 1
    reservation = reserve(ledger, *limits)
    clock.now += 2
    ledger.finish(reservation, SCOPE, record(clock.now, prompt_tokens=60))
    ledger.flush()
    assert [used for _, used, _ in ledger.used(SCOPE, limits)] == [0, 60]


@pytest.mark.parametrize(("scope", "tokens"), [("gemini/default", 60), ("gemini/default:m", 50), ("other/default", 0)])
def test_a_limit_added_later_counts_what_its_period_has_seen(
    ledger: Ledger, clock: Clock, scope: str, tokens: int
) -> None:
    for at, model, count in ((NOON - 40 * 86400, "m", 7), (NOON - 86400, "m", 50), (NOON, "n", 10)):
        ledger.finish(None, SCOPE, record(at, model=model, prompt_tokens=count, cost_usd=count / 100))
    ledger.flush()
    limits = per(9, "month"), per(99, "month", "tokens"), per(9, "month", "usd")
    reserve(ledger, *limits, scope=scope)
    requests = {60: 3, 50: 2, 0: 1}[tokens]
    assert [used for _, used, _ in ledger.used(scope, limits)] == [requests, tokens, tokens / 100]


def test_used_of_a_ledger_that_does_not_exist_is_nothing_and_makes_nothing(tmp_path: Path, clock: Clock) -> None:
    ledger = Ledger(tmp_path / "state", clock=clock)
    limits = per(15, "min"), per(10, "month", "usd")
    ledger.refresh()
    assert ledger.used(SCOPE, limits) == [(limits[0], 0, None), (limits[1], 0, NOON + 7.5 * 86400)]
    assert list(ledger.history()) == []
    ledger.close()
    assert not (tmp_path / "state").exists()


def test_what_no_window_sees_is_removed_even_from_a_clock_that_ran_ahead(file_ledger: Ledger, clock: Clock) -> None:
    clock.now += 10 * 86400
    reserve(file_ledger, per(5, "hour"))
    clock.now = NOON
    reserve(file_ledger, per(5, "hour"), per(5, "day"))
    clock.now += 2 * 86400
    reserve(file_ledger, per(5, "hour"))
    assert len(rows(file_ledger.directory, "SELECT * FROM sent")) == 1
    assert rows(file_ledger.directory, "SELECT * FROM total") == []


# Processes


def spawned_child(folder: Path, network: bool, count: int, threads: int, out: object) -> None:
    """Reserve from several threads at once, each with an event loop of its own and several tasks on it."""
    ledger = Ledger(folder, network=network)
    answers: list[int | Refused] = []

    async def burst() -> None:
        answers.extend(await asyncio.gather(*(ledger.reserve(Claim(SCOPE, (per(60, "min"),))) for _ in range(count))))

    running = [threading.Thread(target=lambda: asyncio.run(burst())) for _ in range(threads)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    ledger.close()
    out.put(granted(answers))


@pytest.mark.slow
@both_journals
def test_a_limit_is_exact_over_processes_threads_and_loops(tmp_path: Path, network: bool) -> None:
    out = SPAWN.Queue()
    children = [SPAWN.Process(target=spawned_child, args=(tmp_path, network, 25, 2, out)) for _ in range(4)]
    for child in children:
        child.start()
    counts = [out.get() for _ in children]
    for child in children:
        child.join()
    assert sum(counts) == 60
    assert rows(tmp_path, "PRAGMA journal_mode") == [("delete" if network else "wal",)]


@both_journals
def test_a_limit_is_exact_over_two_ledgers_of_one_process(tmp_path: Path, network: bool) -> None:
    ledgers = [Ledger(tmp_path, network=network) for _ in range(2)]
    answers: list[int | Refused] = []

    async def ask(ledger: Ledger) -> None:
        for _ in range(60):
            answers.append(await ledger.reserve(Claim(SCOPE, (per(70, "min"),))))

    running = [threading.Thread(target=lambda one=one: asyncio.run(ask(one))) for one in ledgers]
    for one in running:
        one.start()
    for one in running:
        one.join()
    for one in ledgers:
        one.close()
    assert granted(answers) == 70


VICTIM = """
import asyncio, sys, time
from pathlib import Path
from biollm.config import Limit
from biollm.ledger import Ledger, Claim, Record
ledger = Ledger(Path(sys.argv[1]), network=sys.argv[2] == "True")
async def main():
    while True:
        got = await ledger.reserve(Claim("s", (Limit("requests", 1e6, "min"), Limit("requests", 1e6, "day"))))
        sys.stdout.write("r"); sys.stdout.flush()
        ledger.finish(got, "s", Record(time.time(), "r", "d", "p", "a", "m", "ok", prompt_tokens=1))
        if sys.argv[3] == "flush":
            ledger.flush()
            sys.stdout.write("f"); sys.stdout.flush()
asyncio.run(main())
"""


@pytest.mark.slow
@both_journals
@pytest.mark.parametrize("flush", ["flush", "stream"])
def test_a_killed_process_loses_nothing_and_blocks_nobody(tmp_path: Path, network: bool, flush: str) -> None:
    dice, told = random.Random(7), ""
    with contextlib.closing(Ledger(tmp_path, network=network)) as ledger:
        for _ in range(4):
            victim = subprocess.Popen(
                [sys.executable, "-c", VICTIM, tmp_path, str(network), flush], stdout=subprocess.PIPE, text=True
            )
            told += victim.stdout.read(20)
            time.sleep(dice.random() / 20)  # any moment will do
            victim.send_signal(signal.SIGKILL)
            told += victim.communicate()[0]
            assert isinstance(reserve(ledger, per(1e6, "min"), scope="other"), int)
        assert ledger._availability.failed_at is None
        day = per(1e6, "day")
        ((_, reserved, _),) = ledger.used("s", [day])
        assert told.count("r") <= reserved <= told.count("r") + 4
        assert told.count("f") <= sum(1 for _ in ledger.history()) <= reserved
    unfinished = rows(tmp_path, "SELECT count(*) FROM sent WHERE tokens IS NULL AND scope = 's'")[0][0]
    finished = rows(tmp_path, "SELECT tokens FROM total WHERE scope = 's'")[0][0]
    assert finished + unfinished == reserved
    for file in ("quotas.db", "history.db"):
        assert rows(tmp_path, "PRAGMA integrity_check", file) == [("ok",)]


def test_a_count_in_memory_forgets_what_no_limit_sees(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").touch()  # no folder can be made in it
    ledger = Ledger(tmp_path / "file" / "ledger", clock=clock, network=False)
    for _ in range(20):
        assert isinstance(reserve(ledger, per(2, "min"), per(1000, "hour")), int)
        clock.now += 600
    assert ledger._process().memory.execute("SELECT count(*) FROM sent").fetchone()[0] <= 8
    ledger.close()


def test_a_forked_child_writes_for_itself_and_leaves_its_parents_files_alone(tmp_path: Path) -> None:
    ledger, limit = Ledger(tmp_path), per(10, "min")
    reserve(ledger, limit)
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            got = [reserve(ledger, limit) for _ in range(6)]
            ledger.finish(got[0], SCOPE, record(time.time(), request="child"))
            ledger.close()
            status = 0
        os._exit(status)
    got = [reserve(ledger, limit) for _ in range(6)]
    assert os.waitpid(child, 0)[1] == 0
    ledger.finish(got[0], SCOPE, record(time.time(), request="parent"))
    ledger.flush()
    assert {entry.request for entry in ledger.history()} == {"child", "parent"}
    assert ledger.used(SCOPE, [limit])[0][1] == 10
    ledger.close()


def in_a_child(work: Callable[[], object]) -> int:
    """Do `work` in a fork, and return the child's process id; its exit status is 0 if nothing was raised."""
    if child := os.fork():
        return child
    with contextlib.suppress(BaseException):
        work()
        os._exit(0)
    os._exit(1)


@both_journals
def test_a_forked_child_writes_though_its_parent_was_writing(
    tmp_path: Path, network: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite's locks of the moment are copied, and nothing would release them in the child."""
    ledger, ended = Ledger(tmp_path, network=network), threading.Event()

    def write() -> None:
        while not ended.is_set():
            ledger.finish(None, SCOPE, record(time.time(), request="parent"))
            ledger.note_origins([f"{number}" for number in range(500)], "m")
            ledger.flush()

    def attempt(number: int) -> None:
        got = reserve(ledger, per(1000, "day"))
        assert isinstance(got, int)
        ledger.finish(got, SCOPE, record(time.time(), request=f"child {number}"))
        ledger.close()
        assert not caplog.messages

    thread = threading.Thread(target=write)
    thread.start()
    try:
        statuses = {os.waitpid(in_a_child(partial(attempt, number)), 0)[1] for number in range(30)}
    finally:
        ended.set()
        thread.join()
    ledger.close()
    assert statuses == {0}
    assert len({entry.request for entry in ledger.history()}) == 31


def test_a_forked_child_loses_nothing_when_its_parent_closes_the_files(tmp_path: Path) -> None:
    """The last to close a file removes its WAL."""
    ledger, limit = Ledger(tmp_path, network=False), per(10, "day")
    reserve(ledger, limit)
    go, waiting = os.pipe(), os.pipe()

    def child() -> None:
        reserve(ledger, limit)
        os.write(waiting[1], b"-")
        os.read(go[0], 1)
        reserve(ledger, limit)
        ledger.close()

    pid = in_a_child(child)
    os.read(waiting[0], 1)
    ledger.close()
    os.write(go[1], b"-")
    assert os.waitpid(pid, 0)[1] == 0
    assert Ledger(tmp_path, network=False).used(SCOPE, [limit])[0][1] == 3


def test_a_fork_gets_its_turn_though_a_file_is_always_in_use(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.db", "CREATE TABLE IF NOT EXISTS t (n)", False, "NORMAL", 1)
    database.write(lambda _: None)
    ended = threading.Event()

    def read_on() -> None:
        while not ended.is_set():
            with reading(tmp_path / "x.db", 1):
                time.sleep(0.05)

    def open_files() -> None:
        assert "x.db" not in [each.resolve().name for each in Path("/proc/self/fd").iterdir()]

    threads = [threading.Thread(target=read_on) for _ in range(4)]
    for at, thread in enumerate(threads):
        thread.start()
        time.sleep(0.0125 * (at < 3))
    try:
        assert {os.waitpid(in_a_child(open_files), 0)[1] for _ in range(5)} == {0}
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_a_fork_while_a_file_is_read_leaves_the_childs_own_uses_counted(tmp_path: Path) -> None:
    path, working, go = tmp_path / "x.db", threading.Event(), threading.Event()
    database = Database(path, "CREATE TABLE IF NOT EXISTS t (n)", False, "NORMAL", 1)
    database.write(lambda _: None)

    def slowly(db: sqlite3.Connection) -> None:
        working.set()
        go.wait()
        db.execute("INSERT INTO t VALUES (1)")

    def write_during_a_fork() -> None:
        writing = threading.Thread(target=database.write, args=(slowly,))
        writing.start()
        working.wait()
        os.waitpid(in_a_child(lambda: None), 0)
        go.set()
        writing.join()

    with reading(path, 1):
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            write_during_a_fork()
        os._exit(0)
    os.waitpid(child, 0)
    assert read(path, "SELECT n FROM t") == [(1,)]


EXIT = """
import asyncio, sys
from pathlib import Path
from biollm.config import Limit
from biollm.ledger import Ledger, Claim, Record
ledger = Ledger(Path(sys.argv[1]))
got = asyncio.run(ledger.reserve(Claim("s", (Limit("requests", 5, "min"),))))
ledger.finish(got, "s", Record(1.0, "r", "d", "p", "a", "m", "ok"))
ledger.cool("key:1", 1e9, "refused")
"""


def test_a_clean_exit_writes_what_waits_and_says_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", EXIT, tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(Ledger(tmp_path).history())) == 1
    assert rows(tmp_path, "SELECT tokens IS NULL FROM sent") == [(0,)]
    assert rows(tmp_path, "SELECT key FROM cooldown") == [("key:1",)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "history.db",
        "history.lock",
        "quotas.db",
        "quotas.lock",
    ]


# Cooling


def test_cooling_blocks_at_once_here_and_soon_in_every_process(make: Make, clock: Clock) -> None:
    one, other = make(), make()
    one.cool("account:gemini/default", 30.5, "429 from gemini")
    assert one.blocked() == {"account:gemini/default": Cooldown(NOON + 30.5, "429 from gemini", stated=True)}
    assert other.blocked() == {}
    one.flush()
    refused = reserve(other, per(15, "min"), cooling=("endpoint:x", "account:gemini/default"))
    assert refused == Refused(NOON + 30.5, "429 from gemini, frees in 31 s", "account:gemini/default")
    assert other.blocked() == one.blocked()
    assert isinstance(reserve(other, cooling=("endpoint:x",)), int)
    clock.now += 30.5
    assert isinstance(reserve(other, per(15, "min"), cooling=("account:gemini/default",)), int)
    assert other.blocked() == {}
    one.close()
    other.close()


def test_any_answer_of_the_ledger_brings_the_news_of_other_processes(make: Make, clock: Clock) -> None:
    one, other = make(), make()
    one.cool("key:1", 9, "401")
    one.flush()
    reserve(other, scope="unrelated")
    assert other.blocked() == {"key:1": Cooldown(NOON + 9, "401", stated=True)}
    one.cool("key:2", 9, "401")
    one.flush()
    other.refresh()
    assert set(other.blocked()) == {"key:1", "key:2"}
    one.close()
    other.close()


def test_of_two_blocks_the_longer_holds(file_ledger: Ledger, clock: Clock) -> None:
    for seconds, reason in ((20, "minute"), (7200, "day"), (20, "minute")):
        file_ledger.cool("account:a", seconds, reason)
    assert file_ledger.blocked() == {"account:a": Cooldown(NOON + 7200, "day", stated=True)}
    file_ledger.flush()
    assert rows(file_ledger.directory, "SELECT key, until, reason FROM cooldown") == [("account:a", NOON + 7200, "day")]
    assert reserve(file_ledger, cooling=("account:a",)).reason == "day, frees in 2 h"


LADDER = (0.0, 15.0, 30.0)


def fail(ledger: Ledger, kind: str = "overloaded") -> float:
    """Let an endpoint fail once more, and return for how many seconds it rests."""
    ledger.cool("endpoint:a", None, "HTTP 503", kind=kind, ladder=LADDER)
    ledger.flush()
    return max((block.until for block in ledger.blocked().values()), default=0.0)


def test_failures_in_a_row_rest_longer_up_to_a_bound_and_a_success_starts_anew(make: Make, clock: Clock) -> None:
    one, other = make(), make()
    assert fail(one) == 0, "the first rests nothing"
    for seconds in (15, 30, 30):
        clock.now += 40
        other.refresh()
        assert fail(other) == clock.now + seconds
    clock.now += 40
    one.refresh()
    assert one.failing(["endpoint:a"])
    one.recover(["endpoint:a", "endpoint:b"])
    one.flush()
    assert not one.failing(["endpoint:a"])
    other.refresh()
    assert fail(other) == 0
    one.close()
    other.close()


def test_failures_that_come_together_are_one_step(ledger: Ledger, clock: Clock) -> None:
    fail(ledger)
    clock.now += 1
    assert [fail(ledger) - clock.now for _ in range(5)] == [15] * 5


def test_a_failure_of_another_kind_begins_a_ladder_of_its_own(ledger: Ledger, clock: Clock) -> None:
    fail(ledger)
    clock.now += 1
    fail(ledger)
    clock.now += 20
    assert fail(ledger, "timeout") == 0


def test_a_success_ends_an_estimated_cooldown_in_every_process_and_no_stated_one(make: Make, clock: Clock) -> None:
    one, other = make(), make()
    one.cool("account:a", 60, "429")
    one.cool("endpoint:a", None, "503", ladder=(15.0,))
    one.flush()
    reserve(other, scope="unrelated")
    assert set(other.blocked()) == {"account:a", "endpoint:a"}
    other.recover(["account:a", "endpoint:a"])
    other.flush()
    reserve(one, scope="unrelated")
    assert set(one.blocked()) == set(other.blocked()) == {"account:a"}
    one.close()
    other.close()


def test_a_success_ends_the_row_of_stated_cooldowns_too_once_they_are_over(ledger: Ledger, clock: Clock) -> None:
    ledger.cool("account:a", 5, "429")
    ledger.flush()
    ledger.recover(["account:a"])
    assert ledger.failing(["account:a"]), "the provider said until when"
    clock.now += 6
    ledger.recover(["account:a"])
    ledger.flush()
    ledger.refresh()
    assert not ledger.failing(["account:a"])


def test_what_fails_while_another_succeeds_stays_on_cooldown(make: Make, clock: Clock) -> None:
    one, other = make(), make()
    one.cool("endpoint:a", None, "503", ladder=(15.0,))
    one.flush()
    other.refresh()
    clock.now += 20
    one.cool("endpoint:a", None, "503", ladder=(15.0,))
    one.flush()
    other.recover(["endpoint:a"])  # by what it knew
    other.flush()
    one.refresh()
    assert one.blocked()
    one.close()
    other.close()


def test_a_cooldown_just_made_outlives_the_news_that_an_older_one_is_gone(make: Make, clock: Clock) -> None:
    one, other = make(), make()
    one.cool("endpoint:a", None, "503", ladder=(15.0,))
    one.flush()
    one.refresh()
    other.refresh()
    other.recover(["endpoint:a"])
    other.flush()
    one._blocked["endpoint:a"] = Cooldown(NOON + 30, "again")  # made, and not written yet
    one.refresh()
    assert one.blocked()
    one.close()
    other.close()


def test_a_cooldown_of_a_clock_that_ran_ahead_is_forgotten(make: Make, clock: Clock) -> None:
    with contextlib.closing(make()) as ahead:
        clock.now += 1e9
        ahead.cool("account:a", 60, "429")
    clock.now -= 1e9
    with contextlib.closing(make()) as ledger:
        assert isinstance(reserve(ledger, cooling=("account:a",)), int)


def test_a_stated_time_takes_the_place_of_an_estimate(ledger: Ledger) -> None:
    ledger.cool("account:a", None, "429", kind="limited", ladder=(600.0,))
    ledger.cool("account:a", 2, "429", kind="limited", ladder=(600.0,))
    assert ledger.blocked()["account:a"].until == NOON + 2


def test_a_reservation_that_was_not_sent_is_taken_back(ledger: Ledger) -> None:
    limits = (per(1, "min"), per(1, "day"))
    first = reserve(ledger, *limits)
    assert isinstance(first, int)
    ledger.release(first, SCOPE)
    ledger.flush()
    ledger.refresh()
    assert isinstance(reserve(ledger, *limits), int)
    assert isinstance(reserve(ledger, *limits), Refused)


def test_refresh_forgets_a_limit_found_full_so_that_a_raised_one_counts(ledger: Ledger) -> None:
    reserve(ledger, per(1, "day"))
    assert isinstance(reserve(ledger, per(1, "day")), Refused)
    ledger.refresh()
    assert isinstance(reserve(ledger, per(2, "day")), int)


# History


def test_history_keeps_every_fact_in_the_order_of_time(ledger: Ledger) -> None:
    full = record(
        NOON + 1, reason="é ✓ 'quoted'", status=503, ms=12.5, ttft_ms=3.25, prompt_tokens=7, completion_tokens=9,
        cost_usd=0.25, order=4, degraded=True, estimated=True, tags={"agent": "ErrorDiagnosisAgent", "user": "ü"},
    )  # fmt: skip
    for entry in (full, record(NOON), record(NOON + 2), record(NOON + 2, request="r2")):
        ledger.finish(None, SCOPE, entry)
    ledger.flush()
    assert list(ledger.history()) == [record(NOON), full, record(NOON + 2), record(NOON + 2, request="r2")]
    assert list(ledger.history(NOON + 1, NOON + 2)) == [full]


def test_history_is_read_in_pages_and_blocks_no_writer_meanwhile(tmp_path: Path, clock: Clock) -> None:
    with contextlib.closing(Ledger(tmp_path, clock=clock, network=True)) as ledger:
        for number in range(5001):
            ledger.finish(None, SCOPE, record(NOON, request=str(number)))
        ledger.flush()
        reading = ledger.history()
        assert next(reading).request == "0"
        ledger.finish(None, SCOPE, record(NOON, request="last"))
        ledger.flush()
        assert [entry.request for entry in reading] == [*map(str, range(1, 5001)), "last"]


def test_a_finished_attempt_reaches_the_disk_by_itself(ledger: Ledger) -> None:
    ledger.finish(reserve(ledger, per(5, "min")), SCOPE, record())
    deadline = time.monotonic() + 20  # 50 ms are promised; a loaded machine gets longer
    while not list(ledger.history()) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert list(ledger.history()) == [record()]


# Faults: completions work, limits hold in the process, one warning says so


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(folder / "quotas.db", isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield


@contextlib.contextmanager
def stopped_in_the_queue(folder: Path) -> Iterator[object]:
    """Another process stands at the head of the queue and does nothing."""
    held, go = SPAWN.Event(), SPAWN.Event()
    other = SPAWN.Process(target=hold_queue, args=(folder / "quotas.lock", held, go))
    other.start()
    held.wait()
    yield go
    go.set()
    other.join()


def hold_queue(path: Path, held: object, go: object) -> None:
    with path.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        held.set()
        go.wait()


@pytest.mark.slow
@both_journals
@pytest.mark.parametrize("trouble", [locked, stopped_in_the_queue])
def test_while_the_file_is_held_limits_are_kept_here_and_are_told_afterwards(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, network: bool, trouble: Callable
) -> None:
    limit, month = per(3, "min"), per(100, "month", "tokens")
    with contextlib.closing(Ledger(tmp_path, clock=clock, network=network)) as ledger:
        reserve(ledger)
        with trouble(tmp_path):
            answers = [reserve(ledger, limit, month) for _ in range(5)]
            assert granted(answers) == 3
            ledger.finish(answers[0], SCOPE, record(prompt_tokens=100))
            clock.now += 61
            assert "tokens/month used" in reserve(ledger, limit, month).reason
        (warning,) = caplog.messages
        assert str(tmp_path) in warning
        assert "BIOLLM_STATE_DIR" in warning
        clock.now += 5
        assert isinstance(reserve(ledger, limit, scope="other"), int)
        ledger.flush()
        assert [used for _, used, _ in ledger.used(SCOPE, [limit, month])] == [0, 100]
        assert rows(tmp_path, "SELECT count(*), total(tokens) FROM sent") == [(4, 100)]
        assert len(list(ledger.history())) == 1
    assert len(caplog.messages) == 1


def test_a_queue_that_moves_is_waited_in(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """On a machine so busy that a turn takes longer than 250 ms the limits stay exact."""
    with contextlib.closing(Ledger(tmp_path, clock=clock)) as ledger:
        reserve(ledger, per(1, "day"))
        soon = time.time() + 60
        os.utime(tmp_path / "quotas.db-wal", (soon, soon))  # as if somebody wrote all the time
        with stopped_in_the_queue(tmp_path) as go:
            threading.Timer(0.4, go.set).start()
            assert isinstance(reserve(ledger, per(1, "day")), Refused)
    assert caplog.messages == []


def test_a_process_that_stands_still_blames_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def ask(ledger: Ledger) -> int | Refused:
        asking = asyncio.create_task(ledger.reserve(Claim(SCOPE, (per(1, "day"),))))
        await asyncio.sleep(0)
        time.sleep(0.4)  # noqa: ASYNC251 # as a callback of the user's may
        return await asking

    with contextlib.closing(Ledger(tmp_path, network=True)) as ledger:
        reserve(ledger, per(1, "day"))
        with stopped_in_the_queue(tmp_path) as go:
            threading.Timer(0.45, go.set).start()
            assert isinstance(asyncio.run(ask(ledger)), Refused)
    assert caplog.messages == []


@pytest.mark.slow
def test_a_queue_that_stands_still_is_waited_in_for_250_ms(tmp_path: Path, clock: Clock) -> None:
    waits = []
    with contextlib.closing(Ledger(tmp_path, clock=clock, network=True)) as ledger:
        reserve(ledger)
        with stopped_in_the_queue(tmp_path):
            for _ in range(4):
                began = time.monotonic()
                reserve(ledger)
                waits.append(time.monotonic() - began)
                clock.now += 6
    assert 0.2 < min(waits) < 0.9


def test_two_writers_of_one_process_open_a_new_file_at_once(tmp_path: Path) -> None:
    """SQLite lets one of two connections change a file's journal, and tells the other at once that it is locked."""
    written: list[int] = []

    def write(number: int, start: threading.Barrier) -> None:
        schema = "CREATE TABLE IF NOT EXISTS t (a)"
        file = Database(tmp_path / f"{number}.db", schema, False, "NORMAL", 0.2)
        start.wait()
        with contextlib.closing(file), contextlib.suppress(sqlite3.Error):
            file.write(lambda db: db.execute("INSERT INTO t VALUES (1)") and None)
            written.append(number)

    for number in range(60):
        start = threading.Barrier(2)
        running = [threading.Thread(target=write, args=(number, start)) for _ in range(2)]
        for one in running:
            one.start()
        for one in running:
            one.join()
    assert written == sorted([*range(60)] * 2)


def hold_one_queue_for_the_other(folder: Path, held: object) -> None:
    with (folder / "quotas.lock").open("r+") as quotas, (folder / "history.lock").open("r+") as history:
        fcntl.lockf(quotas, fcntl.LOCK_EX)
        held.set()
        fcntl.lockf(history, fcntl.LOCK_EX)


def test_two_queues_that_wait_for_each_other_are_not_taken_for_a_deadlock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        ledger.finish(reserve(ledger), SCOPE, record())
        ledger.flush()
        with (tmp_path / "history.lock").open("r+") as history:
            fcntl.lockf(history, fcntl.LOCK_EX)
            held = SPAWN.Event()
            other = SPAWN.Process(target=hold_one_queue_for_the_other, args=(tmp_path, held))
            other.start()
            held.wait()
            time.sleep(0.05)  # it is waiting now
            threading.Timer(0.05, fcntl.lockf, (history, fcntl.LOCK_UN)).start()
            assert isinstance(reserve(ledger, per(5, "min")), int)
            other.join()
    assert caplog.messages == []


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look at " * 100)


def torn(path: Path) -> None:
    """The header is right, every page after it is not."""
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


@both_journals
@pytest.mark.parametrize("damage", [garbage, torn])
@pytest.mark.parametrize("name", ["quotas.db", "history.db"])
def test_a_damaged_file_is_set_aside_and_a_new_one_begins(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, network: bool, damage: Callable, name: str
) -> None:
    limit, day = per(3, "min"), per(3, "day")
    with contextlib.closing(Ledger(tmp_path, clock=clock, network=network)) as ledger:
        ledger.finish(reserve(ledger, limit, day), SCOPE, record())
    damage(tmp_path / name)
    with contextlib.closing(Ledger(tmp_path, clock=clock, network=network)) as ledger:
        ledger.finish(reserve(ledger, limit, day), SCOPE, record(request="after"))
        ledger.flush()
        assert "after" in {entry.request for entry in ledger.history()}
        counted = [used for _, used, _ in ledger.used(SCOPE, [limit, day])]
        assert counted == [1 if name == "quotas.db" else 2, 2]  # history knows what the day held
        assert ledger._availability.failed_at is None
    (warning,) = caplog.messages
    assert f"{tmp_path / name} is damaged" in warning
    assert (tmp_path / f"{name}.corrupt-1").exists()


def test_a_damaged_file_is_reported_by_reading_and_left_in_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    garbage(tmp_path / "history.db")
    assert list(Ledger(tmp_path).history()) == []
    (warning,) = caplog.messages
    assert "sets the damaged file aside" in warning and "writable" not in warning
    assert (tmp_path / "history.db").exists()


def test_a_damaged_quota_file_that_is_read_first_is_set_aside_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    garbage(tmp_path / "quotas.db")
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        assert (ledger.token_ratio("m"), ledger.used(SCOPE, [per(3, "min")])[0][1]) == (1, 0)
    (warning,) = caplog.messages
    assert f"{tmp_path / 'quotas.db'} is damaged" in warning


def test_a_file_that_somebody_removed_is_made_again(file_ledger: Ledger, tmp_path: Path) -> None:
    reserve(file_ledger, per(3, "min"))
    for path in tmp_path.glob("quotas.db*"):
        path.unlink()
    reserve(file_ledger, per(3, "min"))
    assert len(rows(tmp_path, "SELECT * FROM sent")) == 1


def test_a_folder_that_cannot_be_made_stops_nothing(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    with contextlib.closing(Ledger(tmp_path / "state", clock=clock)) as ledger:
        answers = [reserve(ledger, per(3, "min")) for _ in range(5)]
        assert granted(answers) == 3
        ledger.finish(answers[0], SCOPE, record())
        ledger.cool("account:a", 60, "429")
        assert isinstance(reserve(ledger, cooling=("account:a",)), Refused)
        ledger.refresh()
        assert list(ledger.history()) == []
        ledger.flush()
        assert len(caplog.messages) == 1
        (tmp_path / "state").unlink()
        clock.now += 61
        assert isinstance(reserve(ledger, per(3, "min")), int)
        ledger.finish(None, SCOPE, record())
        ledger.flush()
        assert len(list(ledger.history())) == 2
    assert len(caplog.messages) == 1


def test_a_full_disk_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with contextlib.closing(Ledger(tmp_path)) as ledger:
            reserve(ledger, per(3, "min"))
            with contextlib.suppress(OSError), (tmp_path / "ballast").open("wb") as ballast:
                while True:
                    ballast.write(bytes(4096))
                    ballast.flush()
            big = record(reason="x" * 300_000)
            for _ in range(3):
                ledger.finish(None, SCOPE, big)
            ledger.flush()
            assert len(caplog.messages) == 1
            assert isinstance(reserve(ledger, per(3, "min")), int)
            assert isinstance(reserve(ledger, per(3, "min"), scope="b"), int)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_job_that_can_never_be_written_holds_up_no_other(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    ledger.finish(None, SCOPE, record(tags={"agent": object()}))
    ledger.flush()
    ledger.finish(None, SCOPE, record())
    ledger.flush()
    assert list(ledger.history()) == [record()]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("answered", [False, True], ids=["before its answer", "with its answer"])
def test_a_caller_that_is_cancelled_leaves_nothing_counted(ledger: Ledger, answered: bool) -> None:
    limit = per(1, "day")

    def stand_still() -> None:
        until(lambda: ledger.used(SCOPE, [limit])[0][1] == 1)
        time.sleep(0.1)

    async def leave() -> None:
        asking = asyncio.ensure_future(ledger.reserve(Claim(SCOPE, (limit,))))
        await asyncio.sleep(0)  # the job is handed in
        stand_still()  # while it is done
        if answered:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(leave())
    ledger.flush()
    assert isinstance(reserve(ledger, limit), int)


def test_a_request_that_its_caller_granted_itself_is_counted_once() -> None:
    """The store had counted it, but the answer came too late; all that is written with it must stay."""
    claim = Claim(SCOPE, (per(9, "min"), per(9, "day"), per(900, "min", "tokens")), tokens=100)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.executescript(quotas.SCHEMA)
        quotas.reserve(db, NOON, claim, 7)
        quotas.grant(db, NOON, claim, 7)
        used = [
            quotas.used_of(lambda *query: db.execute(*query).fetchall(), SCOPE, each, NOON) for each in claim.limits
        ]
    assert [amount for amount, _ in used] == [1, 1, 100]


# Files


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize(("folder_mode", "mode"), [(None, 0o600), (0o2770, 0o660)], ids=["own", "group"])
@both_journals
def test_files_are_private_or_the_groups_whatever_the_umask(
    tmp_path: Path, umask: int, folder_mode: int | None, mode: int, network: bool
) -> None:
    folder = tmp_path / "state" / "biollm"
    if folder_mode:
        folder.mkdir(parents=True)
        folder.chmod(folder_mode)
    before = os.umask(umask)
    try:
        ledger = Ledger(folder, network=network)
        ledger.finish(reserve(ledger, per(5, "min")), SCOPE, record())
        ledger.flush()
        modes = {path.name: path.stat().st_mode & 0o7777 for path in folder.iterdir()}
        ledger.close()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o7777 == (folder_mode or 0o700)
    assert set(modes.values()) == {mode}, modes
    assert len(modes) == (6 if network else 8), modes


@pytest.mark.parametrize(
    ("folder", "network"),
    [
        ("/home/ana/.local/state", True),
        ("/home/local/ana", False),
        ("/tmp/x", False),
        ("/data/my lab/x", True),
        ("/scratch", True),
        ("/scratchy", False),
        ("/mnt/ssh/x", True),
        ("/over/x", False),
    ],
)
def test_network_file_systems_are_known_by_the_type_of_their_mount(tmp_path: Path, folder: str, network: bool) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nfiler:/home /home nfs4 rw 0 0\n/dev/sdb /home/local xfs rw 0 0\n"
        "filer:/lab /data/my\\040lab beegfs_nodev rw 0 0\nfs /scratch lustre rw 0 0\n"
        "me@x: /mnt/ssh fuse.sshfs rw 0 0\nfiler:/o /over nfs rw 0 0\n/dev/sdc /over ext4 rw 0 0\n"
    )
    assert on_network(Path(folder), mounts) is network


@pytest.mark.parametrize(
    ("mount", "local"),
    [
        ("ext4 rw", False),
        ("nfs4 rw,vers=4.2,local_lock=none", False),
        ("nfs rw,vers=3,nolock,local_lock=all", True),
        ("nfs rw,vers=3,local_lock=posix", True),
        ("lustre rw,flock", False),
        ("lustre rw,localflock", True),
        ("cifs rw,nobrl", True),
        ("fuse.sshfs rw", True),
        ("ext4 rw,nolock", False),
    ],
)
def test_locks_that_reach_no_other_host_are_known_by_the_mount(tmp_path: Path, mount: str, local: bool) -> None:
    (mounts := tmp_path / "mounts").write_text(f"x / {mount} 0 0\n")
    assert locks_are_local(Path("/home/ana"), mounts) is local


def test_where_mounts_cannot_be_read_a_folder_counts_as_local(tmp_path: Path) -> None:
    assert on_network(tmp_path, tmp_path / "missing") is False


def test_columns_that_a_newer_version_added_are_left_alone(tmp_path: Path, clock: Clock) -> None:
    def use() -> Ledger:
        ledger = Ledger(tmp_path, clock=clock)
        ledger.cool("key:1", 9, "401")
        ledger.finish(reserve(ledger, per(9, "day")), SCOPE, record(clock.now))
        ledger.flush()
        _rollup.roll(ledger)
        return ledger

    use().close()
    for file in ("quotas.db", "history.db"):
        with contextlib.closing(sqlite3.connect(tmp_path / file)) as db:
            names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for name in names:
                db.execute(f"ALTER TABLE {name} ADD COLUMN newer DEFAULT 0")
    clock.now += 86400
    again = use()
    assert "key:1" in rows(tmp_path, "SELECT key FROM cooldown WHERE until > 0")[0]
    assert again.used(SCOPE, [per(9, "day")])[0][1] == 1
    assert len(rows(tmp_path, "SELECT * FROM attempt", "history.db")) == 2
    assert len(rows(tmp_path, "SELECT * FROM rollup", "history.db")) == 2
    again.close()
