"""The failure table: what each kind of failure of a deployment leads to. `classify.py` recognises the kind. Pure.

A time that the provider states (`reset_times.py`) replaces the ladder; `ledger/quotas.next_cooldown` applies both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scope = Literal["", "account", "key", "endpoint", "deployment"]
Kind = Literal[
    "credit", "affordable", "key", "forbidden", "limited", "too_long", "modality", "unsupported", "not_served",
    "refusal", "malformed", "used_up", "overloaded", "broken", "blocked", "hung_up", "reset", "timeout", "late",
    "empty", "schema", "refused", "unreachable", "proxy", "stranger", "unsent",
]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What one kind of failure leads to.

    Attributes:
        cools: What is put on cooldown; "" is nothing: only this request skips the deployment.
        ladder: Seconds of the first, second, ... cooldown in a row if the provider gives no time; a success resets it.
        widens: What is also put on cooldown once a second deployment of it fails in the same way.
        next: Whether the next deployment is tried.
        blames_request: Whether the provider says that the request itself is wrong.
        transient: Whether a later try may succeed.
        retry: Whether the same deployment is tried once more at once, unless it is known to be failing.
    """

    cools: Scope = ""
    ladder: tuple[float, ...] = ()
    widens: Scope = ""
    next: bool = True
    blames_request: bool = False
    transient: bool = True
    retry: bool = False


# Seconds. The end of an outage is noticed within 20 s in its first minute; a long outage costs few requests.
_OUTAGE = (15.0, 20.0, 30.0, 60.0, 120.0, 300.0)
_HOURS = (600.0, 3600.0, 6 * 3600.0, 24 * 3600.0)
RULES: dict[Kind, Rule] = {
    # The account and its key
    "credit": Rule("account", (3600.0, 4 * 3600.0, 24 * 3600.0), transient=False),  # no credit, or a usage limit
    "affordable": Rule(),  # the credit buys a shorter answer: retried with fewer tokens
    "key": Rule("key", _HOURS, transient=False),
    "limited": Rule("account", (60.0, 60.0, 120.0, 300.0, 600.0)),
    # The model
    "forbidden": Rule("deployment", _HOURS, transient=False),
    "not_served": Rule("deployment", _HOURS, transient=False),
    "too_long": Rule(transient=False),
    "modality": Rule(transient=False),  # takes no images, audio, ...
    "unsupported": Rule(transient=False),  # lacks a parameter or a message role
    # The request
    "refusal": Rule(transient=False),  # by content policy; `on_refusal` decides whether the next one is tried
    "malformed": Rule(transient=False, blames_request=True),
    "used_up": Rule(next=False, transient=False, blames_request=True),  # max_tokens, before there was any text
    "unsent": Rule(next=False, transient=False, blames_request=True),  # LiteLLM could not translate it
    # The server
    "overloaded": Rule("deployment", _OUTAGE, widens="endpoint", retry=True),
    "broken": Rule("deployment", _OUTAGE, widens="endpoint"),
    "timeout": Rule("deployment", _OUTAGE, widens="endpoint"),
    "late": Rule("deployment", (0.0, 15.0, 30.0, 60.0)),  # no first token in time
    "empty": Rule(),
    "schema": Rule(transient=False),
    # The network
    "blocked": Rule("endpoint", _OUTAGE),  # a CDN's page instead of the provider's answer
    "hung_up": Rule("endpoint", (0.0, *_OUTAGE), retry=True),  # a pooled connection may just have been closed
    "reset": Rule("endpoint", _OUTAGE, retry=True),
    "refused": Rule("endpoint", _OUTAGE),
    "unreachable": Rule("endpoint", (600.0, 1800.0, 3600.0)),
    "proxy": Rule("endpoint", _OUTAGE),
    "stranger": Rule("endpoint", _OUTAGE),  # another program answered
}


@dataclass(frozen=True)
class Failure:
    """What a failed attempt means.

    Attributes:
        kind: Its row in RULES.
        reason: One sentence; may quote the provider, so redact keys before showing it.
        status: The HTTP status, or None when no answer came.
        wait: Seconds that the provider says to wait; None if it does not say.
        instead: What is put on cooldown if it is not what the rule says.
        afford: Tokens of answer that the account's credit still buys.
        sent: Whether anything was handed to the HTTP client.
        reached: Whether the provider may have got it, and counted it.
    """

    kind: Kind
    reason: str
    status: int | None = None
    wait: float | None = None
    instead: Scope | None = None
    afford: int | None = None
    sent: bool = True
    reached: bool = True

    @property
    def rule(self) -> Rule:
        """Return what this kind of failure leads to."""
        return RULES[self.kind]

    @property
    def cools(self) -> Scope:
        """Return what is put on cooldown."""
        return self.rule.cools if self.instead is None else self.instead


EMPTY = Failure("empty", "the response has no content and no tool call")
NO_CHOICES = Failure("empty", "the response has no choices")
CUT = Failure("broken", "the stream ended before it was complete")
BROKE_OFF = Failure("broken", "the provider ended the response with an error")
FILTERED = Failure("refusal", "the provider's content filter blocked the response")
CUT_SHORT = Failure("too_long", "the answer reached this deployment's output limit, and others allow more")
USED_UP = Failure("used_up", "max_tokens was used up before there was any text")
STRANGER = Failure("stranger", "another program uses the server's port: the response lacks the server's start id")


def timed_out(seconds: float, *, shortened: bool, what: str = "answer", first: bool = False) -> Failure:
    """Return the failure of an attempt that took longer than `seconds`.

    Args:
        seconds: Its limit.
        shortened: Whether the caller set a lower limit than is configured; then the provider is not to blame.
        what: What did not come.
        first: Whether it is a stream without any content yet: late, which is not broken.
    """
    reason = f"no {what} within {seconds:g} s"
    return Failure("late" if first else "timeout", reason, instead="" if shortened else None)


def unreachable(seconds: float) -> Failure:
    """Return the failure of a host that accepted no connection in `seconds`."""
    return Failure("unreachable", f"no connection within {seconds:g} s (a firewall?)")
