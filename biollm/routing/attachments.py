"""Puts attachments into the messages, each cut to what fits the deployment that is sent the request. Pure.

The question is never cut. LiteLLM trims whole messages, oldest first, which would drop the log and keep the greeting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from biollm.errors import PromptTooLongError
from biollm.inputs.digest import Digest, Excerpt
from biollm.inputs.tokens import estimate
from biollm.routing.deployments import WHOLE
from biollm.routing.structured import Message
from biollm.types import counted, short

STDIN = "stdin"  # the name of piped text, which gets no heading


@dataclass(frozen=True)
class Fitted:
    """Messages as a deployment gets them.

    Attributes:
        tokens: Estimated tokens of the attachments in there.
        notes: A sentence for each attachment that was condensed.
        whole: Whether nothing was left out.
    """

    messages: Sequence[Message]
    tokens: int
    notes: tuple[str, ...]
    whole: bool


def size(attachments: Sequence[Digest]) -> int:
    """Return the estimated tokens of the attachments, of very long ones at least of what is kept."""
    return sum(estimate(each.head) + estimate(each.tail) for each in attachments)


def whole_text(attachments: Sequence[Digest]) -> str:
    """Return the attachments uncut.

    Raises:
        PromptTooLongError: One is longer than any model's context.
    """
    texts: list[str] = []
    for each in attachments:
        excerpt = each.cut(WHOLE)
        if not excerpt.whole:
            message = f"{each.name} is too long: no context holds its {counted(excerpt.lines, 'line')}."
            raise PromptTooLongError(message, hint="Let it be condensed: leave out --no-condense, condense=False.")
        texts.append(_headed(each.name, excerpt.text))
    return "\n\n".join(texts)


def fit(
    messages: Sequence[Message], attachments: Sequence[Digest], tokens: int, context: int | None, ratio: float
) -> Fitted:
    """Return the messages with the attachments, cut to about `tokens` together, before the last question.

    Args:
        messages: The request's messages; they are not changed.
        attachments: What the question is about. Short ones leave their room to long ones.
        tokens: Estimated tokens for all attachments.
        context: The deployment's context, and `ratio`: how many tokens it counts for an estimated one; for the notes.
    """
    excerpts: dict[int, Excerpt] = {}
    left, sizes = tokens, [size([each]) for each in attachments]
    for done, at in enumerate(sorted(range(len(attachments)), key=sizes.__getitem__)):
        excerpts[at] = attachments[at].cut(left // (len(attachments) - done))
        left = max(0, left - excerpts[at].tokens)
    ordered = [excerpts[at] for at in range(len(attachments))]
    notes = [
        _note(each.name, excerpt, context, ratio)
        for each, excerpt in zip(attachments, ordered, strict=True)
        if not excerpt.whole
    ]
    text = "\n\n".join(_headed(each.name, excerpt.text) for each, excerpt in zip(attachments, ordered, strict=True))
    return Fitted(add_text(messages, text), sum(each.tokens for each in ordered), tuple(notes), not notes)


def add_text(messages: Sequence[Message], text: str) -> list[Message]:
    """Return the messages with a text before the content of the last one of the user's."""
    made = list(messages)
    at = next((at for at in reversed(range(len(made))) if made[at]["role"] == "user"), None)
    if at is None:
        return [*made, {"role": "user", "content": text}]
    content = made[at].get("content") or ""
    if isinstance(content, str):
        made[at] = {**made[at], "content": f"{text}\n\n{content}" if content.strip() else text}
    else:
        made[at] = {**made[at], "content": [{"type": "text", "text": text}, *content]}
    return made


def _headed(name: str, text: str) -> str:
    return text if name == STDIN else f"--- {name} ---\n{text}"


def _note(name: str, excerpt: Excerpt, context: int | None, ratio: float) -> str:
    tokens = short(excerpt.tokens * ratio)
    of = f" of {short(context)}" if context else ""
    return f"{name}: {counted(excerpt.lines, 'line')} condensed to {excerpt.kept:,} (about {tokens}{of} tokens)"
