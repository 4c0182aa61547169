"""What a process makes once is made once, whichever of its threads needs it first."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from provider import Loopback

from biollm._runtime import background, ledger
from biollm.client import get_model_client
from biollm.routing import candidates, import_router


def test_threads_that_need_the_same_thing_share_one() -> None:
    made: list[object] = []

    def make() -> object:
        time.sleep(0.05)  # the other threads come meanwhile
        made.append(object())
        return made[-1]

    key, start = object(), threading.Barrier(8)

    def need(_: int) -> object:
        start.wait()
        return background().once(key, make)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(need, range(8))) == set(made) and len(made) == 1


def test_making_one_thing_may_need_another() -> None:
    here, keys = background(), (object(), object())
    assert here.once(keys[0], lambda: [here.once(keys[1], lambda: "inner")]) == ["inner"]


@contextmanager
def frequent_switches(work: Callable[[int], object]) -> Iterator[None]:
    """Switch threads as often as possible while another thread calls `work` with 0, 1, 2 ..."""
    ended, interval = threading.Event(), sys.getswitchinterval()

    def run() -> None:
        for number in count():
            if ended.is_set():
                return
            work(number)

    thread = threading.Thread(target=run)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        yield
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()


def test_requests_are_answered_while_other_threads_make_things(net: Loopback, waterfall: Callable[..., Path]) -> None:
    waterfall(first=net.serve())
    client, here = get_model_client(), background()
    client.complete("hi")

    def make_and_forget(number: int) -> None:
        here.once(("test", number), object)
        here.kept.pop(("test", number - 100), None)

    async def fifty() -> list[str]:
        return [answer.provider for answer in await asyncio.gather(*(client.acomplete("hi") for _ in range(50)))]

    with frequent_switches(make_and_forget):
        for _ in range(3):
            assert asyncio.run(fifty()) == ["first"] * 50
            client = get_model_client()


def test_what_a_model_refused_is_looked_up_while_another_thread_notes_more(
    net: Loopback, waterfall: Callable[..., Path]
) -> None:
    waterfall(first=net.serve())
    [candidate] = get_model_client().explain()

    def note(number: int) -> None:
        if number < 3000:
            candidates.note_refusal(candidate.deployment, frozenset({f"kind {number}"}))

    with frequent_switches(note):
        for _ in range(300):
            assert not candidates.refuses(candidate.deployment, frozenset({"image"}))


def test_requests_are_answered_while_another_thread_reloads_the_configuration(
    net: Loopback, waterfall: Callable[..., Path]
) -> None:
    waterfall({"data_policy": "local_only"}, first=net.serve())
    client, reloads = get_model_client(sender="direct"), set[int]()

    def reload(number: int) -> None:
        client.reload()
        reloads.add(number)

    with frequent_switches(reload):
        while len(reloads) < 5:
            assert client.policy() == "local_only"
        for _ in range(20):
            assert client.complete("hi").provider == "first"


def test_threads_that_import_the_router_at_once_leave_the_process_as_it_was() -> None:
    def work(_: int) -> None:
        for _ in range(2000):
            import_router()

    import_router()
    before = dict(os.environ)
    with frequent_switches(lambda _: import_router()), ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert gc.isenabled() and dict(os.environ) == before


def _complete_in_a_thread_that_outlives_the_target() -> None:
    client = get_model_client(sender="direct")
    client.complete("first")

    def later() -> None:
        for _ in range(3):
            time.sleep(0.1)
            client.complete("hi")

    threading.Thread(target=later).start()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_multiprocessing_ends_after_its_threads_and_writes_what_they_used(
    net: Loopback, waterfall: Callable[..., Path]
) -> None:
    waterfall(first=net.serve())
    child = multiprocessing.get_context("fork").Process(target=_complete_in_a_thread_that_outlives_the_target)
    child.start()
    child.join(30)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()
    assert [each.outcome for each in ledger().history()] == ["ok"] * 4


_AT_EXIT = """
import asyncio, atexit
from biollm.client import get_model_client
from biollm.errors import UsageError

def late():
    for ask in (lambda: client.complete("hi"), lambda: list(client.stream("hi")), lambda: asyncio.run(client.acomplete("hi"))):
        try:
            ask()
        except UsageError as error:
            print(error)

atexit.register(late)
client = get_model_client(sender="direct")
client.complete("hi")
"""


def test_a_request_after_the_connections_are_closed_at_exit_is_refused(
    net: Loopback, waterfall: Callable[..., Path]
) -> None:
    waterfall(first=net.serve())
    done = subprocess.run([sys.executable, "-c", _AT_EXIT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("The process is ending") == 3, done
