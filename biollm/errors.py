"""The exceptions of biollm, each with its fields, a hint and the exit code of the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from urllib.parse import unquote, urlsplit

from biollm.types import Attempt, known


class BiollmError(Exception):
    """Base of everything biollm raises on purpose. `hint`: how to fix it, one sentence, or None."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self._advise(hint)

    def _advise(self, hint: str | None) -> None:
        self.hint = hint
        if hint:
            self.add_note(hint)  # a traceback shows it

    def to_json(self) -> dict[str, Any]:
        """Return what a gateway sends to its client: the class, the message and the fields."""
        left_out = ("attempts", "partial", "problems", "__notes__")
        given = {name: value for name, value in vars(self).items() if name not in left_out}
        attempts: Iterable[Attempt] = getattr(self, "attempts", ())
        facts = [dict(vars(each)) for each in attempts]
        return {"class": type(self).__name__, "message": str(self), **given, "attempts": facts}

    @staticmethod
    def from_json(given: Mapping[str, Any], **fields: Any) -> BiollmError:
        """Return the error that `to_json` wrote, with further fields; one of an unknown class is a CompletionError."""
        kind: Any = globals().get(str(given.get("class")))
        if not (isinstance(kind, type) and issubclass(kind, BiollmError)):
            kind = CompletionError
        error: BiollmError = kind.__new__(kind, given.get("message"))  # as unpickling does: constructors differ
        error._advise(given.get("hint"))
        vars(error).update({name: given[name] for name in ("retry_after", "kind", "name", "choices") if name in given})
        vars(error).update(attempts=tuple(known(Attempt, each) for each in given.get("attempts", ())), **fields)
        return error


class UsageError(BiollmError):
    """The call, or the command line, is wrong."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A `name` that is not among the `choices` of its `kind`: "provider", "model", "account"."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        self.kind, self.name, self.choices = kind, name, tuple(dict.fromkeys(choices))
        hint = f"{nearest(name, self.choices, repr)} Known: {', '.join(self.choices) or 'none'}.".lstrip()
        super().__init__(f"There is no {kind} named {name!r}.", hint=hint)


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration file. `line` counts from 1; 0 means the file as a whole."""

    file: str
    line: int
    key: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        key = f" {self.key}:" if self.key else ""
        return f"{where}:{key} {self.message}" + (f" {self.hint}" if self.hint else "")


class ConfigError(BiollmError):
    """The configuration is wrong. `problems` lists everything found, not only the first."""

    exit_code = 78

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        more = [f"... and {len(self.problems) - 20} more."] if len(self.problems) > 20 else []
        super().__init__("\n".join([*map(str, self.problems[:20]), *more]))  # one screen


class CompletionError(BiollmError):
    """No deployment could answer. `attempts`: each that was tried or skipped, in order, with its reason."""

    exit_code = 69

    def __init__(self, message: str, attempts: Sequence[Attempt] = (), *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.attempts = tuple(attempts)


class AllLimitedError(CompletionError):
    """Every deployment is at a limit or cooling down. `retry_after` is in seconds."""

    exit_code = 75

    def __init__(self, message: str, attempts: Sequence[Attempt], *, retry_after: float) -> None:
        super().__init__(message, attempts, hint=f"Retry after {retry_after:.0f} s.")
        self.retry_after = retry_after


class KeysRefusedError(CompletionError):
    """Every key is missing or was refused."""

    exit_code = 77


class RequestRejectedError(CompletionError):
    """The request itself is invalid: it cannot be sent, or every deployment tried rejects it."""


class PromptTooLongError(RequestRejectedError):
    """The prompt, or the prompt with its answer, is too long for every deployment that could serve it."""

    exit_code = 65


class ContentPolicyError(CompletionError):
    """A provider refused the prompt or its answer by its content policy; no other was tried."""


class DeadlineError(CompletionError):
    """The caller's deadline passed before an answer came."""


class InterruptedStreamError(CompletionError):
    """A stream ended before its last event. `partial` is the text received so far."""

    def __init__(self, message: str, attempts: Sequence[Attempt], *, partial: str) -> None:
        super().__init__(message, attempts)
        self.partial = partial


class SlurmError(BiollmError):
    """Slurm refused a request or did not answer in time."""

    exit_code = 69


class JobFailedError(SlurmError):
    """A job ended before its server was ready. The message holds state, reason and the last log lines."""


class DoesNotFitError(BiollmError):
    """A model cannot start on the GPUs it would get; the hint says what would work."""

    exit_code = 78


class UnavailableError(BiollmError):
    """An optional part is missing (an extra, weights, a token); the hint names the command that adds it."""

    exit_code = 69


def nearest(name: str, choices: Iterable[str], show: Callable[[str], str] = str) -> str:
    """Return "Did you mean X?" with the one of `choices` that looks most like `name`; "" where none does."""
    return "".join(f"Did you mean {show(near)}?" for near in get_close_matches(name, list(choices), n=1))


def install_command(extra: str) -> str:
    """Return the command that adds an extra to this installation, from where biollm itself was installed."""
    from importlib.metadata import distributions  # late: only where something is missing

    texts = (each.read_text("direct_url.json") for each in distributions(name="biollm"))
    origin: dict[str, Any] = json.loads(next(texts, None) or "{}")  # PEP 610; an index leaves none
    url, flag = str(origin.get("url", "")), ""
    wanted = f"biollm[{extra}] @ {url}" if url else f"biollm[{extra}]"
    if (folder := origin.get("dir_info")) is not None:
        wanted, flag = f"{unquote(urlsplit(url).path)}[{extra}]", "-e " if folder.get("editable") else ""
    elif vcs := origin.get("vcs_info"):
        wanted = f"biollm[{extra}] @ {vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f"pip install {flag}{shlex.quote(wanted)}"
