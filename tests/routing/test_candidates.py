"""Who may serve a request now: keys, servers and weights that go and come while a process runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from provider import Loopback

from biollm._runtime import apart
from biollm.config import load_config
from biollm.ledger import Claim, Ledger, Refused
from biollm.routing.candidates import DeploymentPool, explain, note_refusal
from biollm.routing.deployments import Requirements
from biollm.slurm.endpoints import Endpoint

Write = Callable[..., Path]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger", network=False)
    yield ledger
    ledger.close()


def server(start: str, key: Path) -> Endpoint:
    """A running server of the model `mine`."""
    return Endpoint(
        start=start, job="1", submission="t", model="mine", host="node1", base_url="http://node1:8000/v1", key_file=key,
        owner=os.getuid(), left_s=3600.0, link=1,
    )  # fmt: skip


def standings(pool: DeploymentPool) -> dict[str, str]:
    pool.refresh()
    return {candidate.deployment.id: candidate.status for candidate in pool.candidates(Requirements())}


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
    pool = DeploymentPool(load_config(), ledger, tmp_path, "any", lambda: servers)
    ledger.cool("account:elsewhere/default", 60, "so that every rung's needs are looked at")
    assert standings(pool) == {"gpu/mine#bad": "absent", "gpu/mine#good": "ready", "after/small": "ready"}
    assert "the key of the server on node1 cannot be read" in pool.missing(pool.deployments[0])


def api_key(folder: Path) -> None:
    (folder / "api.key").write_text("sk-planted-later-0123456789")
    (folder / "api.key").chmod(0o600)


def server_key(folder: Path) -> None:
    (folder / "server.key").write_text("key")


def weights(folder: Path) -> None:
    (folder / "x.gguf").touch()


def copilot_login(folder: Path) -> None:
    """What is there when the token of a login could not be exchanged: the rung waits for another one."""
    (folder / "github_copilot" / "default").mkdir(parents=True)
    (folder / "github_copilot" / "default" / "access-token").write_text("ghu-planted")


@pytest.mark.parametrize(
    ("comes", "candidate", "stands"),
    [
        (api_key, "filed/small", "ready"),
        (server_key, "gpu/mine#late", "ready"),
        (weights, "last/tiny", "ready"),
        (copilot_login, "github_copilot/small", "keyless"),
        (lambda _folder: None, "filed/small", "keyless"),
    ],
)
def test_what_comes_while_the_process_runs_is_noticed(
    waterfall: Write, ledger: Ledger, tmp_path: Path, comes: Callable[[Path], None], candidate: str, stands: str
) -> None:
    models = {
        "mine": {"type": "local", "hf_id": "lab/mine"},
        "tiny": {"type": "embedded", "gguf": str(tmp_path / "x.gguf")},
    }
    waterfall(
        {"models": models},
        filed={"key_file": str(tmp_path / "api.key"), "base_url": "http://localhost:1/v1"},
        github_copilot={"accounts": [{"name": "default"}]},
        gpu={"type": "local", "models": ["mine"]},
        last={"type": "embedded", "models": ["tiny"]},
    )
    servers = [server("late", tmp_path / "server.key")]
    pool = DeploymentPool(load_config(), ledger, tmp_path, "any", lambda: servers, interval=0)
    before = standings(pool)
    assert set(before.values()) == {"keyless", "absent"}
    comes(tmp_path)
    assert pool.refresh() is (stands == "ready"), "the Router follows when it is told of a change"
    assert standings(pool) == before | {candidate: stands}
    assert not pool.refresh()


def test_what_is_missing_is_not_looked_for_at_each_request(waterfall: Write, ledger: Ledger, tmp_path: Path) -> None:
    waterfall(filed={"key_file": str(tmp_path / "api.key"), "base_url": "http://localhost:1/v1"})
    pool = DeploymentPool(load_config(), ledger, tmp_path, "any")
    pool.refresh()
    api_key(tmp_path)
    assert not pool.refresh()


def test_a_server_that_left_is_no_reason_to_wait_for_ever(waterfall: Write, ledger: Ledger, tmp_path: Path) -> None:
    waterfall({"models": {"mine": {"type": "local", "hf_id": "lab/mine"}}}, gpu={"type": "local", "models": ["mine"]})
    server_key(tmp_path)
    servers = [server("late", tmp_path / "server.key")]
    pool = DeploymentPool(load_config(), ledger, tmp_path, "any", lambda: servers)
    pool.refresh()
    [deployment] = pool.deployments
    servers.clear()
    pool.refresh()
    assert asyncio.run(asyncio.wait_for(asyncio.to_thread(pool.look, deployment), 5)) == "its server has stopped"


def test_a_thread_that_runs_out_of_items_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(apart(next, iter(())), 5))


@pytest.mark.parametrize(
    ("limit", "sent", "stands"),
    [
        ({"rate_limit": "2/min"}, 1, "ready"),
        ({"rate_limit": "2/min"}, 2, "limited"),
        ({"rate_limit": "15/min", "share": "1/2"}, 6, "ready"),
        ({"rate_limit": "15/min", "share": "1/2"}, 7, "limited"),  # an eighth would be more than 7.5
        ({"rate_limit": "15/day", "share": "1/2"}, 7, "limited"),
    ],
)
def test_a_limit_is_full_to_explain_when_it_is_to_the_ledger(
    waterfall: Write, ledger: Ledger, tmp_path: Path, limit: dict[str, str], sent: int, stands: str
) -> None:
    waterfall(first={"base_url": "http://localhost:1/v1", **limit})
    pool = DeploymentPool(load_config(), ledger, tmp_path, "any")
    pool.refresh()
    claim = Claim(pool.deployments[0].scope, pool.deployments[0].limits)

    async def send(count: int) -> list[int | Refused]:
        return [await ledger.reserve(claim) for _ in range(count)]

    assert not any(isinstance(answer, Refused) for answer in asyncio.run(send(sent)))
    (candidate,) = explain(pool, Requirements())
    assert candidate.status == stands
    (answer,) = asyncio.run(send(1))
    assert isinstance(answer, Refused) == (stands == "limited")


def test_a_refusal_of_images_is_remembered_for_requests_with_them(
    net: Loopback, waterfall: Write, ledger: Ledger, tmp_path: Path
) -> None:
    waterfall(blind=net.refusing(), seeing=net.refusing())
    pool = DeploymentPool(load_config(), ledger, tmp_path, "any")
    pool.refresh()

    def status(*media: str) -> list[str]:
        return [candidate.reason for candidate in pool.candidates(Requirements(media=frozenset(media)))]

    assert status("images") == ["", ""]
    note_refusal(pool.deployments[0], frozenset({"images"}))
    assert status() == status("audio") == ["", ""]
    assert status("images") == ["refused images before", ""]
    assert status("images", "audio") == ["refused audio and images before", ""]
    note_refusal(pool.deployments[1], frozenset({"images", "audio"}))
    assert status("images") == ["refused images before", ""]  # it may have been for the audio
