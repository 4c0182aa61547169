"""Replaces keys, addresses, user names and home folders by placeholders, and puts them back into the answer. Pure.

A placeholder stands for the same text in the whole request (`<user-1>`), so a model can still tell two users apart.
No list of patterns finds everything: it makes leaks rarer, and is no anonymisation.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

_KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:sk|pk|rk)-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bgh[oprsu]_\w{30,}|\bgithub_pat_\w{22,}"
    r"|\bglpat-[\w-]{20,}|\bhf_[A-Za-z0-9]{20,}|\bxox[abprs]-[\w-]{10,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|\bbiollm-agent\.[\w.-]{20,}",
    re.DOTALL,
)
# Groups: what stays, and what is replaced.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("password", re.compile(r"(\b\w[\w+.-]*://)([^\s/:@<>\"'\\]+:[^\s/@<>\"'\\]+)(?=@)")),
    ("key", re.compile(r"(?i)(\bbearer\s+)([\w.~+/-]{12,}=*)")),
    (
        "key",
        re.compile(
            r"(?i)((?:passwd|password|secret|(?:api[_-]?key|access[_-]?key|token|credential)(?=[\w-]*[\"']?\s*[=:]\s*\S*\d))"
            r"[\w-]*[\"']?\s*[=:]\s*[\"']?)([^\s\"'\\<>,;&]{8,})"
        ),
    ),
    ("password", re.compile(r"(?i)(\s--?(?:password|passwd|token|secret|api-key)[ =][\"']?)([^\s\"'\\]{4,})")),
    ("password", re.compile(r"(\blogin \S+ password )(\S+)")),
    ("email", re.compile(r"()(\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b)")),
)
_HOME = re.compile(r"(?:/home(?:/[a-z]\d?)?|/Users|(?:/\w+)?/users?|/u)/([A-Za-z_][\w.-]*)")
_USERS = re.compile(
    r"(?:\b(?:(?i:user-?_?(?:name|id))|user|login|owner|LOGNAME|USER)\s*[=:]\s*[\"']?|\b(?:uid=\d+\(|login ))([A-Za-z_][\w.-]{2,})"
)
# Of `ls -l`: the owner and the group.
_LISTED = re.compile(r"^[bcdlps-](?:[r-][w-][xsStT-]){3}[.+@]?[ \t]+\d+[ \t]+([A-Za-z_][\w.-]*)[ \t]", re.MULTILINE)
# The head of a table with a column of users: of squeue and ps; of sacct, above dashes or with bars.
_HEAD = re.compile(
    r"^(?:[ \t]*(?:[A-Z][A-Z()%:_-]+[ \t]+)*USER\b[A-Z()%:_ \t-]+"
    r"|(?=.*\bUser\b)[\w \t]+(?=\n[ -]*---)|(?=.*\bUser\b)\w+(?:\|\w+)+\|?)$",
    re.MULTILINE,
)
_COMMON = {"data", "group", "groups", "home", "lab", "nobody", "public", "root", "runner", "scratch", "share", "shared",
           "true", "false", "none", "null", "user", "username", "users", "work"}  # fmt: skip
_PART = re.compile(r"<(?:[a-z]{1,8}(?:-\d{0,6})?)?$")
_PLURALS = {"key": "keys", "password": "passwords", "email": "e-mail addresses", "user": "user names",
            "home": "home folders", "name": "names"}  # fmt: skip
_SINGULARS = {"email": "e-mail address", "user": "user name", "home": "home folder"}


class Redaction:
    """The placeholders of one request. `names`: further texts to replace, such as sample names; `secrets`: known keys."""

    def __init__(self, names: Iterable[str] = (), secrets: Iterable[str] = ()) -> None:
        self._names = sorted({name for name in names if name.strip()}, key=len, reverse=True)
        self._secrets = sorted({secret for secret in secrets if len(secret) >= 8}, key=len, reverse=True)
        self._found: dict[tuple[str, str], str] = {}  # (kind, text) -> placeholder
        self._texts: dict[str, str] = {}  # placeholder -> text
        self._taken: set[str] = set()

    def hidden(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with the placeholders in all texts and arguments of tools."""
        texts: list[str] = []
        _changed(messages, lambda text: texts.append(text) or text)
        self._taken.update(found for text in texts for found in re.findall(r"<[a-z]+-\d+>", text))
        users = {name for text in texts for name in _users(text)}
        return _changed(messages, lambda text: self._hide(text, users))

    def restored(self, value: Any) -> Any:
        """Return a JSON value with the texts in place of the placeholders; strings that hold JSON stay JSON."""
        if isinstance(value, str):
            return self.restore(value)
        if isinstance(value, dict):
            return {key: self.restored(each) for key, each in cast("dict[Any, Any]", value).items()}
        return [self.restored(each) for each in cast("list[Any]", value)] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        """Return a text with what the placeholders stand for."""
        if "<" not in text or not self._texts:
            return text
        quoted = text.lstrip()[:1] in ("{", "[")
        for placeholder, original in self._texts.items():
            if placeholder in text:
                text = text.replace(placeholder, json.dumps(original, ensure_ascii=False)[1:-1] if quoted else original)
        return text

    def mask(self, text: str) -> str:
        """Return a text with the placeholders for what was replaced before, and nothing else."""
        for (_, original), placeholder in self._found.items():
            text = text.replace(original, placeholder)
        return text

    def note(self) -> str:
        """Return what was replaced, "redacted: 3 user names, 1 key"; empty for nothing."""
        counts = Counter(kind for kind, _ in self._found)
        parts = [f"{n} {_PLURALS[kind] if n > 1 else _SINGULARS.get(kind, kind)}" for kind, n in counts.items()]
        return f"redacted: {', '.join(parts)}" if parts else ""

    def _hide(self, text: str, users: set[str]) -> str:
        for name in self._names:
            if name in text:
                text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", lambda at: self._placeholder("name", at[0]), text)
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, self._placeholder("key", secret))
        text = _KEYS.sub(lambda at: self._placeholder("key", at[0]), text)
        for kind, pattern in _PATTERNS:
            text = pattern.sub(partial(self._second, kind), text)
        text = _HOME.sub(lambda at: self._placeholder("home", at[0]) if at[1] not in _COMMON else at[0], text)
        for user in sorted(users, key=lambda name: (-len(name), name)):
            if user in text:
                text = re.sub(
                    rf"(?<![\w<-]){re.escape(user)}(?![\w>])", lambda at: self._placeholder("user", at[0]), text
                )
        return text

    def _second(self, kind: str, found: re.Match[str]) -> str:
        return found[1] + self._placeholder(kind, found[2])

    def _placeholder(self, kind: str, text: str) -> str:
        if re.fullmatch(r"<[a-z]+-\d+>", text):  # in place of a key that was found before
            return text
        if (kind, text) not in self._found:
            number = sum(each == kind for each, _ in self._found) + 1
            while f"<{kind}-{number}>" in self._taken:  # the text has such a word of its own
                number += 1
            self._found[kind, text] = f"<{kind}-{number}>"
            self._taken.add(f"<{kind}-{number}>")
            self._texts[f"<{kind}-{number}>"] = text
        return self._found[kind, text]


class Restorer:
    """Puts the texts back into a stream, whose pieces may cut a placeholder."""

    def __init__(self, redaction: Redaction) -> None:
        self._redaction, self._kept = redaction, ""

    def feed(self, piece: str) -> str:
        """Return what of the stream is complete, with `piece` at its end."""
        text = self._kept + piece
        cut = _PART.search(text)
        self._kept = cut[0] if cut else ""
        return self._redaction.restore(text[: cut.start()] if cut else text)

    def end(self) -> str:
        """Return what was kept back."""
        kept, self._kept = self._kept, ""
        return kept


def _users(text: str) -> Iterable[str]:
    """Return the user names that a text shows: of home folders, and where it says that it is one."""
    found = (*_HOME.findall(text), *_USERS.findall(text), *_LISTED.findall(text), *_in_tables(text))
    return (name for name in found if len(name) > 2 and name.lower() not in _COMMON)


def _in_tables(text: str) -> Iterable[str]:
    """Return the words below the head of a column of users, up to an empty line."""
    heads = [*_HEAD.finditer(text)]
    for head, end in zip(heads, [*(each.start() for each in heads[1:]), len(text)], strict=False):
        rows = text[head.end() : end].lstrip("\n").partition("\n\n")[0].splitlines()
        if "|" in head[0]:
            at = [name.lower() for name in head[0].split("|")].index("user")
            words = [cells[at] for row in rows if len(cells := row.split("|")) > at]
        else:
            column = next(found for found in re.finditer(r"\S+", head[0]) if found[0].lower() == "user")
            words = [
                each[0]
                for row in rows
                for each in re.finditer(r"\S+", row)
                if each.start() < column.end() and each.end() > column.start()
            ]
        yield from (word for word in words if re.fullmatch(r"[A-Za-z_][\w.+-]*", word))


def _changed(messages: Sequence[dict[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return messages with every text and every tool's arguments changed; images and names stay as they are."""
    made: list[dict[str, Any]] = []
    for message in messages:
        new, content = dict(message), message.get("content")
        if isinstance(content, str):
            new["content"] = change(content)
        elif content:
            new["content"] = [{**part, "text": change(part["text"])} if part.get("text") else part for part in content]
        if calls := message.get("tool_calls"):
            new["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": change(call["function"]["arguments"])}}
                for call in calls
            ]
        made.append(new)
    return made
