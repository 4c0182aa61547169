"""Both stores of the ledger give the same answers, whatever is asked of them in whatever order."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import pytest

from biollm.config import Limit
from biollm.ledger import Claim, Ledger, Record, Refused

NOON = 1_795_435_200.0
LIMITS = (
    Limit("requests", 9, "min"), Limit("requests", 3, "s"), Limit("tokens", 900, "min"), Limit("tokens", 4000, "hour"),
    Limit("usd", 3, "hour"), Limit("requests", 150, "day", "13:00 Europe/Berlin"), Limit("tokens", 9000, "day"),
    Limit("usd", 40, "month"),
)  # fmt: skip
LADDER = (0.0, 15.0, 30.0)


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


def comparable(answer: int | Refused) -> Any:
    return "granted" if isinstance(answer, int) else (round(answer.until, 3), answer.reason, answer.key)


def blocks(ledger: Ledger) -> dict[str, Any]:
    return {key: (round(each.until, 3), *each[1:]) for key, each in ledger.blocked().items()}


@pytest.mark.real
@pytest.mark.parametrize("seed", range(6))
def test_a_file_and_a_server_agree_at_every_step(tmp_path: Path, redis_server: Any, seed: int) -> None:
    redis_server.call("FLUSHALL")
    dice, clock = random.Random(seed), Clock()
    stores = (
        Ledger(tmp_path / "file", clock=clock),
        Ledger(tmp_path / "server", clock=clock, server=redis_server.server),
    )
    claims = [
        Claim(f"p/{number % 2}", tuple(dice.sample(LIMITS, dice.randint(1, 5))), ("account:a", f"endpoint:{number}"))
        for number in range(4)
    ]
    under_way: list[tuple[Claim, list[int]]] = []

    def step() -> Any:
        match dice.choice("rrrrrffffcccxwwu"):
            case "r":
                claim = dice.choice(claims)
                claim = Claim(
                    claim.scope, claim.limits, claim.cooling, dice.choice((0, 50, 400)), dice.choice((0.0, 0.125))
                )
                answers = [asyncio.run(each.reserve(claim)) for each in stores]
                if not any(isinstance(each, Refused) for each in answers):
                    under_way.append((claim, answers))  # type: ignore[arg-type]
                return [comparable(each) for each in answers]
            case "f" if under_way:
                claim, reservations = under_way.pop(dice.randrange(len(under_way)))
                tokens, usd = dice.randint(0, 300), dice.randint(0, 8) / 8
                for each, reservation in zip(stores, reservations, strict=True):
                    one = Record(clock.now, "r", "d", "p", "a", "m", "ok", prompt_tokens=tokens, cost_usd=usd)
                    each.finish(reservation, claim.scope, one)
            case "x" if under_way:
                claim, reservations = under_way.pop()
                for each, reservation in zip(stores, reservations, strict=True):
                    each.release(reservation, claim.scope)
            case "c":
                key, seconds = dice.choice(("account:a", "endpoint:1")), dice.choice((None, None, 5.0, 90.0))
                for each in stores:
                    each.cool(key, seconds, "HTTP 503", kind="overloaded", ladder=LADDER)
            case "u":
                for each in stores:
                    each.recover(["account:a", "endpoint:1"])
            case "w":
                clock.now += dice.choice((0.0, 0.25, 1.0, 20.0, 61.0, 700.0))
        for each in stores:
            each.flush()
            each.refresh()
        return [(blocks(each), used(each)) for each in stores]

    def used(ledger: Ledger) -> Any:
        found = [ledger.used(scope, LIMITS) for scope in ("p/0", "p/1")]
        return [(round(amount, 6), ends and round(ends, 3)) for each in found for _, amount, ends in each]

    with contextlib.closing(stores[0]), contextlib.closing(stores[1]):
        for _ in range(150):
            file, server = step()
            assert file == server
