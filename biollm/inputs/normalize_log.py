"""Replaces what differs between two runs of one failure, so that both have one key in the cache of answers.

A fixed list of substitutions: similarity of meaning is no measure, as two failures of one tool share 95% of their
words. docs/cache.md lists RULES line by line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from biollm.errors import UsageError

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)[a-z]*"
_CLOCK = r"\d{1,2}:\d{2}:\d{2}(?:[.,]\d+)?"
_ZONE = r"(?: ?(?:Z|UTC|GMT|[A-Z]{1,3}ST|[A-Z]?CET|[+-]\d{2}:?\d{2})\b)?"

# What is replaced, its pattern, and the replacement; in this order.
RULES: tuple[tuple[str, str, str], ...] = (
    ("colours and other escape sequences", r"\x1b\[[0-?]*[ -/]*[@-~]", ""),
    ("dates", rf"\b\d{{4}}[-/.]\d{{2}}[-/.]\d{{2}}(?:[T ]{_CLOCK})?{_ZONE}", "<time>"),
    ("dates with a month's name",
     rf"\b(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*,? )?(?:{_MONTH}[- ]+\d{{1,2}}|\d{{1,2}}[-/ ]{_MONTH})"
     rf"(?:,?[-/ ]\d{{4}})?(?:[ :,]+{_CLOCK}{_ZONE}(?: \d{{4}})?)?\b", "<time>"),
    ("times of day and long durations", rf"\b{_CLOCK}(?: ?[AP]M)?{_ZONE}", "<time>"),
    ("durations", r"\b\d+(?:\.\d+)?(?:ms|[smhd]| ?(?:sec(?:ond)?|min(?:ute)?|hour|day)s?)\b", "<duration>"),
    ("UUIDs", r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b", "<hash>"),
    ("Nextflow's work folders", r"(?:/[\w.@+~-]+)*/work/[0-9a-f]{2}/[0-9a-f]{6,30}\b", "<work>"),
    ("Nextflow's task hashes", r"\b[0-9a-f]{2}/[0-9a-f]{6,30}\b", "<hash>"),
    ("Nextflow's run names", r"(Launching `[^`\n]*` \[)[a-z]+_[a-z]+\]", r"\1<run>]"),
    ("numbers of Nextflow's tasks", r"\b([A-Z][A-Z0-9_]+) \(\d+\)", r"\1 (<id>)"),
    ("addresses in memory", r"\b0x[0-9a-fA-F]+", "<address>"),
    ("hashes of 7 or more digits", r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,64}\b", "<hash>"),
    ("Slurm's output files", r"\bslurm-\d+(?:_\d+)?\.(out|err)\b", r"slurm-<id>.\1"),
    ("ids of jobs, steps, tasks and processes",
     r"(?i)\b((?:job|step|task|array|process|thread)(?:[ _-]?id)?|[pt]?id)([ :=#]*\(?)\d+(?:[_.]\w+)*", r"\1\2<id>"),
    ("ids of processes that bash reports",
     r"(: +)\d+ (Killed|Terminated|Aborted|Segmentation fault|Bus error|Illegal instruction)", r"\1<id> \2"),
    ("numbered threads", r"\[([A-Za-z][\w ]*)-\d+\]", r"[\1-<id>]"),
    ("hosts that are named as such",
     r"\b((?i:host|hostname|node|nodename|nodelist)[ :=]+|ON )(?=[a-z-]*\d)[a-z][\w-]*(?:\.[\w-]+)*(?=[\s,;:)\]]|$)",
     r"\1<host>"),
    ("names of nodes", r"\b(?:node|compute|cn|nid|worker)-?\d+(?:\.[\w-]+)*\b", "<host>"),
    ("IP addresses", r"\b(?:[12]?\d\d(?:\.\d{1,3}){3}(?::\d+)?|(?:\d{1,3}\.){3}\d{1,3}:\d+)\b", "<host>"),
    ("home folders", r"(?<![\w.])/((?:[\w-]+/)?(?:home|users|Users))/[\w.-]+", r"/\1/<user>"),
    ("first folders in scratch and temporary folders", r"(?<![\w.])((?:/[\w-]+)?/(?:\w*scratch|tmp|shm))/[\w.@+-]+", r"\1/<run>"),
    ("temporary names", r"\b(tmp|temp)[._-]?(?=\w*[A-Z0-9])\w{6,}\b", r"\1<run>"),
    ("numbered folders of runs", r"(?<=/)(?:run|job|batch|attempt|results?)[_-]?\d[\w-]*(?=/)", "<run>"),
    ("memory that a process used", r"(?i)\b([a-z]+-rss|(?:peak_|max)?rss|total-vm|(?:peak_)?vmem|pgtables)([:=] *)[\d.]+ ?\w*", r"\1\2<n>"),
    ("Nextflow's counts of tasks", r"\b([a-z]+Count)=\d+", r"\1=<n>"),
    ("numbers of 5 or more digits", r"\b\d{1,3}(?:,\d{3})+\b|(?<![\w.-])\d{5,}\b(?!\.\d)", "<n>"),
    ("blanks in a row, and at the end of a line", r"[ \t]+(?=\n|$)|(?<=[ \t])[ \t]+", ""),
)  # fmt: skip


def normalize_log(text: str, names: Sequence[str] = ()) -> str:
    """Return a text without what differs between runs of one failure, for `cache_key=`.

    Exit statuses, tools, file names and messages stay. `names` are further texts that differ, such as a sample's:
    `cache_key=functools.partial(normalize_log, names=["tumor_7"])`. The first becomes <name1>, and so on.

    Raises:
        UsageError: The names are one string.
    """
    if isinstance(names, str):
        raise UsageError("names must be a list of strings, not one string.", hint=f"Pass [{names!r}].")
    for pattern, replacement in (*_of_names(tuple(names)), *_compiled()):
        text = pattern.sub(replacement, text)
    return text


def names_of(cache_key: Any) -> list[str] | None:
    """Return the names that a `cache_key` gives `normalize_log`; None where it is another function."""
    bound = partial(cache_key)  # a partial of a partial is one
    simple = bound.func is normalize_log and not bound.args and bound.keywords.keys() <= {"names"}
    return list(bound.keywords.get("names", ())) if simple else None


@cache
def _compiled() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for _, pattern, replacement in RULES]


def _of_names(names: tuple[str, ...]) -> list[tuple[re.Pattern[str], str]]:
    """Return the rules of the names, long ones first; a name may be followed by `_R1`, not by a letter or digit."""
    numbered = sorted(((name, at) for at, name in enumerate(names, 1) if name), key=lambda each: -len(each[0]))
    return [(re.compile(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])"), f"<name{at}>") for name, at in numbered]
