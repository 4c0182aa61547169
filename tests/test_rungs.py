"""Who may serve a request now: keys, servers and weights that go and come while a process runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from biollm.config import load_config
from biollm.endpoints import Endpoint
from biollm.ledger import Ledger
from biollm.routing import Wants
from biollm.rungs import Rungs

Write = Callable[..., Path]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger", network=False)
    yield ledger
    ledger.close()


def server(start: str, key: Path) -> Endpoint:
    """A running server of the model `mine`."""
    return Endpoint(
        start=start, cluster="c", job="1", ticket="t", model="mine", served_model_name="mine", host="node1",
        base_url="http://node1:8000/v1", key_file=key, owner=os.getuid(), left_s=3600.0, age_s=0.0, up_s=60.0, chain="",
        link=1,
    )  # fmt: skip


def standings(rungs: Rungs) -> dict[str, str]:
    rungs.refresh()
    return {rung.deployment.id: rung.standing for rung in rungs.standing(Wants())}


@pytest.mark.parametrize("key", [None, b"\xff\xfe"], ids=["gone", "not text"])
def test_a_server_whose_key_cannot_be_read_is_passed_over(
    waterfall: Write, ledger: Ledger, tmp_path: Path, key: bytes | None
) -> None:
    waterfall(
        {"models": {"mine": {"type": "local", "hf_id": "lab/mine"}}},
        gpu={"type": "local", "models": ["mine"]},
        after="http://localhost:1/v1",
    )
    (tmp_path / "good").write_text("key")
    if key is not None:
        (tmp_path / "bad").write_bytes(key)
    servers = [server("bad", tmp_path / "bad"), server("good", tmp_path / "good")]
    rungs = Rungs(load_config(), ledger, tmp_path, "any", lambda: servers)
    ledger.cool("account:elsewhere/default", 60, "so that every rung's needs are looked at")
    assert standings(rungs) == {"gpu/mine#bad": "absent", "gpu/mine#good": "ready", "after/small": "ready"}
    assert "the key of the server on node1 cannot be read" in rungs.missing(rungs.deployments[0])
