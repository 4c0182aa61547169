"""Finds the lines of a log that report a failure, and weighs them.

`bytes.find` needs a pass per phrase, and Python's `re` tries some eighty phrases at 10 MB/s. Rust's regex engine, which
comes with pydantic, takes one pass at 1 GB/s but returns no position: so whole blocks are tried first, and only the
lines of a block that has a find are tried one by one.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache
from itertools import compress

CAUSE, STATUS, FAILURE, MENTION = 4, 3, 2, 1  # weights: names the cause; an exit status of a signal; fails; may fail
LONG = 2_000  # characters after which a line is cut around its finds
_NEAR, _MARK = 80, 40  # characters that hold any phrase; a gap that its mark would not make shorter

# What a line of any weight has, in stems that cover both cases of the first letter. The engine is three times as fast
# with forty stems as with eighty.
_STEMS = (
    r"rror(?m:[ ,.;!\])>'\x1b]|s\b|: ?[^-0\s]|:?$|=[A-Z])|RROR|xception|raceback|aused by|aile|ailure|FAIL|atal|FATAL|illed|"
    r"oom_kill|oom-kill|OOM|of memory|bad_alloc|annot|an't |ould not|nable to|ot found|o such|o space|enied|quota|LIMIT|"
    r"TIMEOUT|imed out|CANCELLED|egmentation|segfault|SIG|ore dumped|Aborted|on-zero|exit: [^0\s-]|xit stat|xit code|xceed",
    r"fail to|KILLED|llegal|nbound|ndefined|nvalid|issing|orrupt|runcated|efused|ot exist|n't exist|EXITING|xited with|"
    r"xit_code|xitcode|xitStatus|tale file|ead-only f|oo many|Argument list|name resol|reset by|curl: \(|ncompatible|\[E::|o package|nrecognized|"
    r"nknown opt|nexpected|not permitted|No module|ot a valid|Command e|Work dir:|nauthorized|sserti|not match|ot enough|"
    r"nsufficient|nterrupt|re unknown|not in gzip|hecksum|OfMemory",
)
_CAUSE = (
    r"(?i)oom[-_ ]?kill|out[ -]of[ -]memory|OutOfMemory|bad_alloc|allocate (?:memory|genome|vector)|MemoryError|"
    r"memory limit|insufficient memory|not enough (?:memory|RAM|space|disk)|(?-i:\b(?:Killed|Aborted|Terminated)\b)|"
    r"no space left|quota exceeded|command not found|no such (?:file|variable|property|device|option|image)|"
    r"permission denied|access denied|operation not permitted|MissingInput|Missing input|Caused by: \S|"
    r"no module named|no package called|could not find function|object '.*' not found|unbound variable|"
    r"(?:fail|failed|unable|not|cannot) (?:to |be )?(?:open|locate|find|load|create|write|read|resolve|connect|start|parse)|"
    r"(?:not|n't|not?t) exist|NotFoundE|cannot (?:find|access|stat|execute|import)|undefined (?:symbol|variable|name)|"
    r"segmentation fault|segfault|SIG(?:SEGV|KILL|BUS|ABRT|ILL|TERM)|core dumped|illegal instruction|bus error|"
    r"time limit|walltime|\bTIMEOUT\b|NODE_FAIL|preempt|CANCELLED|CUDA error|NCCL error|"
    r"^\s*(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)(?:: |$)|^Error(?: in .+)?: \S|Exception in thread|"
    r"USER ERROR|(?-i:EXITING)|terminate called|FATAL(?: ERROR)?:|fatal error|\[E::|job submission failed|"
    r"invalid (?:partition|account|qos|generic|option|argument|value|sample|feature)|AmbiguousRule|CyclicGraph|"
    r"locked|IncompleteFiles|signature of method|not a valid|validation of|missing required|required value|"
    r"exceeds available|requirement exceeds|connection (?:refused|reset|timed out)|curl: \(|incompatible|timed out|could not resolve|"
    r"name or service|name resolution|toomanyrequests|manifest unknown|unauthorized|HTTP(?: Error|/1.1)? [45]\d\d|"
    r"truncated|corrupt|unexpected end|not in gzip|checksum|CRC|input/output error|stale file|read-only file|"
    r"too many open|list too long|resource temporarily|shared object|GLIBC|version .* not found|syntax error|"
    r"unexpected token|unrecognized|unknown option|invalid option|following (?:\w+ )?arguments are required|"
    r"module\(s\) are unknown|unsatisfi|ResolvePackageNotFound|conflicts?:|do(?:es)? not match|mismatch between|"
    r"double free|stack smashing|panicked|assertion .*failed|AssertionError|is not defined|uninitialized|out of bounds"
)
_STATUS = r"(?i)\bexit.*[ :=(]+(?:1\d\d|255)\b"
_STRONG = f"{_CAUSE}|{_STATUS}"
_FAILURE = (
    r"(?i)(?:^|[^-\w.])errors?(?:[^-\w=]|$)|\[error\]|errors?:|exception|traceback|caused by|fail|fatal|cannot|could not|"
    r"unable to|not found|denied|abort|exit(?:ed)?(?: with)?(?: exit)? ?(?:status|code)|exit: [1-9]|non-zero|"
    r"command (?:error|executed|output):|work dir:|halt|undefined|killed"
)
# Lines that have such a word and report no failure; they are mentions unless they name a cause as well.
_HARMLESS = (
    r"(?i)\b(?:0|no|without|zero) (?:\w+ )?(?:errors?|failures?|failed|exceptions?)\b|\b(?:errors?|fail(?:ed|ures?|edCount)?|"
    r"exceptions?)[\"']? ?[:=] ?(?:0\b|-|none|null|false|\[\])|error[_-]?(?:rate|strategy|model|corr|prob|profile|prone|bar)|"
    r"sequencing error|standard error|exit(?: ?(?:status|code))?: ?0\b|fail-?fast|errors? (?:rate|correct|profile|model)"
)

_VARYING = (string.digits + string.punctuation + string.whitespace + "abcdef").encode() + bytes(range(128, 256))


@cache
def _matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that searches a text for a pattern of Rust's regex engine."""
    from pydantic_core import SchemaValidator, core_schema

    return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex")).isinstance_python


def has_finds(text: str) -> bool:
    """Return whether some line of `text` may be a find."""
    return _matcher(_STEMS[0])(text) or _matcher(_STEMS[1])(text)


def finds(lines: list[str], most: int) -> list[tuple[int, int]]:
    """Return the index and weight of each line that is a find; of those that name no cause, `most` and the last few."""
    hits = sorted({at for stems in _STEMS for at in compress(range(len(lines)), map(_matcher(stems), lines))})
    strong = list(compress(hits, map(_matcher(_STRONG), map(lines.__getitem__, hits))))
    rest = sorted(set(hits).difference(strong))
    return [(at, weigh(lines[at])) for at in (*_outer(strong, most), *_outer(rest, most))]


def _outer(numbers: list[int], most: int) -> list[int]:
    """Return the first `most` numbers, and a quarter as many of the last."""
    return numbers[:most] + numbers[most:][-(most // 4) :]


def weigh(line: str) -> int:
    """Return the weight of a line for which `has_finds` is true."""
    if _matcher(_CAUSE)(line):
        return CAUSE
    if _matcher(_STATUS)(line):
        return STATUS
    return FAILURE if _matcher(_FAILURE)(line) and not _matcher(_HARMLESS)(line) else MENTION


def shape(line: str) -> bytes:
    """Return what lines have in common that differ only in numbers, times, hashes and progress bars."""
    return line[:300].encode(errors="replace").translate(None, _VARYING)


def shorten(line: str, width: int) -> str:
    """Return a line cut to about `width`: its beginning, its end, and what lies around its finds."""
    if len(line) <= width:
        return line
    places = _places(line)
    if width < 400:
        del places[1:]
    room = width * 13 // 16 // max(1, len(places))
    spans = [(at - number * room // 3, at - number * room // 3 + room) for number, at in enumerate(places)]
    shown, end = "", 0
    for first, last in sorted([(0, width // 8 if spans else room), *spans, (len(line) - width // 16, len(line))]):
        if first > end + _MARK:
            shown += f" [... {first - end:,} characters left out ...] "
            end = first
        shown += line[end:last]
        end = max(end, last)
    return shown


def _places(line: str) -> list[int]:
    """Return where the first and the last window of `_NEAR` characters begin that have a find of the highest weight."""
    best: dict[int, list[int]] = {}
    blocks = [at for at in range(0, len(line), 4096) if has_finds(line[at : at + 4096 + _NEAR])]
    for block in _outer(blocks, 40):
        for at in range(block, min(block + 4096, len(line)), _NEAR // 2):
            if has_finds(near := line[at : at + _NEAR]):
                best.setdefault(weigh(near), []).append(at)
    places = best[max(best)] if best else []
    return places[:1] + [at for at in places[-1:] if at > places[0] + _NEAR]
