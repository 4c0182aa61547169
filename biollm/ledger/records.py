"""The values of the ledger: a claim on an account's limits, a refusal, and the record of one attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from biollm.types import Outcome

if TYPE_CHECKING:
    from biollm.config import Limit


@dataclass(frozen=True)
class Claim:
    """What one attempt claims.

    Attributes:
        scope: Owner of the limits: "gemini/default", or "gemini/default:model" if they are per model.
        limits: Every one must have room.
        cooling: Keys whose cooldown blocks the attempt: the account, the endpoint, the API key.
        tokens, usd: Expected use, prompt and answer; counted from `reserve` until `finish` has the real figures.
    """

    scope: str
    limits: tuple[Limit, ...] = ()
    cooling: tuple[str, ...] = ()
    tokens: float = 0.0
    usd: float = 0.0


@dataclass(frozen=True)
class Refused:
    """Nothing may be sent before `until` (seconds since the epoch).

    Attributes:
        reason: One sentence: "15/min used by gemini/default, frees in 12 s".
        key: What blocks: "scope:" and the scope for a limit, else the key on cooldown.
    """

    until: float
    reason: str
    key: str


@dataclass(frozen=True)
class Record:
    """One finished attempt of a request. Times in seconds since the epoch, durations in ms, money in USD.

    Attributes:
        request: The id shared by all attempts of a request.
        ttft_ms: To the first token of a stream.
        order: The deployment's place in the waterfall, from 1.
        cost_usd: None if the price is unknown, or nothing was counted.
        estimated: Whether the tokens are estimated by the length of the text, since the provider reported none.
        tags: The caller's own, such as {"agent": "ErrorDiagnosisAgent"}.
    """

    at: float
    request: str
    deployment: str
    provider: str
    account: str
    model: str
    outcome: Outcome
    reason: str = ""
    status: int | None = None
    ms: float = 0.0
    ttft_ms: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None
    order: int = 0
    degraded: bool = False
    estimated: bool = False
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
