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
    """What one attempt claims."""

    scope: str  # owner of the limits: "gemini/default", or "gemini/default:model" if they are per model
    limits: tuple[Limit, ...] = ()  # every one must have room
    cooling: tuple[str, ...] = ()  # keys whose cooldown blocks the attempt: the account, the endpoint, the API key
    # tokens, usd: expected use, prompt and answer; counted from `reserve` until `finish` has the real figures
    tokens: float = 0.0
    usd: float = 0.0

    @property
    def limited_by(self) -> str:
        """Return the key under which its limits block."""
        return f"scope:{self.scope}"


@dataclass(frozen=True)
class Refused:
    """Nothing may be sent before `until` (seconds since the epoch)."""

    until: float
    reason: str  # one sentence: "15/min used by gemini/default, frees in 12 s"
    key: str  # what blocks: "scope:" and the scope for a limit, else the key on cooldown


@dataclass(frozen=True)
class Record:
    """One finished attempt of a request. Times in seconds since the epoch, durations in ms, money in USD."""

    at: float
    request: str  # the id shared by all attempts of a request
    deployment: str
    provider: str
    account: str
    model: str
    outcome: Outcome
    reason: str = ""
    status: int | None = None
    ms: float = 0.0
    ttft_ms: float | None = None  # to the first token of a stream
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None  # None if the price is unknown, or nothing was counted
    order: int = 0  # the deployment's place in the waterfall, from 1
    degraded: bool = False
    # whether the tokens are estimated by the length of the text, since the provider reported none
    estimated: bool = False
    # the caller's own, such as {"agent": "ErrorDiagnosisAgent"}
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
