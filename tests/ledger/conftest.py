"""The ledger's tests run over both stores: a user's file, and a real Redis server where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from biollm.ledger import Ledger

Make = Callable[..., Ledger]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("redis")
    from redis_server import RedisServer, required

    required()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.real)])
def store(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a Ledger gets to count in a store."""
    if request.param == "sqlite":
        return {}
    server = request.getfixturevalue("redis_server")
    server.call("FLUSHALL")
    return {"server": server.server}


@pytest.fixture
def make(tmp_path: Path, store: dict[str, Any], clock: Any) -> Make:
    """Make a ledger, as another process would."""
    return partial(Ledger, tmp_path, clock=clock, **store)


@pytest.fixture
def ledger(make: Make) -> Iterator[Ledger]:
    with contextlib.closing(make()) as ledger:
        yield ledger


@pytest.fixture
def file_ledger(tmp_path: Path, clock: Any) -> Iterator[Ledger]:
    with contextlib.closing(Ledger(tmp_path, clock=clock)) as ledger:
        yield ledger
