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

# Stems, one of which each find has, in both cases of their first letter; the engine takes fifty at once in its stride,
# and a hundred at a third of the speed. "exit: 0; error: -" stands in each line of a task in Nextflow's log.
_STEMS = tuple(
    "|".join(stems)
    for stems in (
        (
            r"rror(?m:[ ,.;!\])>'\x1b]|s\b|: ?[^-0\s]|:?$|=[A-Z])|RROR|xception|raceback|aused by|aile|ailure|FAIL|atal|FATAL",
            r"illed|oom_kill|oom-kill|OOM|of memory|bad_alloc|quota|o space|LIMIT|TIMEOUT|imed out|CANCELLED|xceed",
            r"annot|an't |ould not|nable to|ot found|o such|enied|segfault|egmentation|SIG|ore dumped|Aborted",
            r"on-zero|exit: [^0\s-]|xit stat|xit code",
        ),
        (
            r"fail to|KILLED|OfMemory|ot enough|nsufficient|DUE TO|Terminated|by signal|llegal|panicked|what\(\):|sserti",
            r"xited with|xit_code|xitcode|xitStatus|eturn code|EXITING|xecution halted|nterrupt|Command e|Work dir:",
            r"nbound|ndefined|nvalid|issing|nrecognized|nknown opt|nknown method|nexpected|ot a valid|not match|ollision",
            r"orrupt|runcated|not in gzip|hecksum|ncompatible|ot exist|n't exist|tale file|ead-only f|oo many|Argument list",
            r"efused|reset by|curl: \(|name resol|nauthorized|not permitted|No module|o package|re unknown|\[E::",
        ),
    )
)
_CAUSE = "(?i)" + "|".join((
    # memory, disk, time
    r"oom[-_ ]?kill|out[ -]of[ -]memory|OutOfMemory|MemoryError|memory limit|bad_alloc|allocate (?:memory|genome|vector)",
    r"insufficient memory|not enough (?:memory|RAM|space|disk)|no space left|quota exceeded|time limit|walltime",
    r"(?-i:\b(?:Killed|Aborted|Terminated)\b|CANCELLED|TIMEOUT\b|NODE_FAIL|DUE TO )|exceeds available",
    # signals and crashes
    r"segmentation fault|segfault|SIG(?:SEGV|KILL|BUS|ABRT|ILL|TERM)|core dumped|illegal instruction|bus error|by signal \d",
    r"what\(\):|double free|stack smashing|panicked|assertion .*failed|AssertionError|CUDA error|NCCL error|out of bounds",
    # files
    r"no such (?:file|variable|property|device|option|image)|n[o']t exist|cannot (?:find|access|stat|execute|import)",
    r"(?:fail|failed|unable|not|cannot) (?:to |be )?(?:open|locate|find|load|create|write|read|resolve|connect|start|parse)",
    r"(?:unable|failed) to (?:acquire|detect)|cannot be locked|permission denied|access denied|operation not permitted",
    r"truncated|corrupt|unexpected end|not in gzip|checksum|input/output error|stale file|read-only file|too many open",
    r"list too long|resource temporarily|incompatible|do(?:es)? not match|mismatch between|name collision|\[E::",
    # software and arguments
    r"command not found|no module named|no package called|could not find function|object '.*' not found|NotFoundE",
    r"undefined (?:symbol|variable|name)|unbound variable|is not defined|shared object|version .* not found|unsatisfi",
    r"syntax error|unexpected token|unrecognized|unknown (?:option|method)|arguments are required|module\(s\) are unknown",
    r"invalid (?:partition|account|qos|generic|option|argument|value|sample|feature)|not a valid|validation of",
    r"missing required|required value|job submission failed",
    # network
    r"connection (?:refused|reset|timed out)|timed out|could not resolve|name or service|name resolution|curl: \(",
    r"toomanyrequests|manifest unknown|unauthorized|HTTP(?: Error|/1.1)? [45]\d\d",
    # languages and workflow managers
    r"^[ \t]*(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)(?:: |$)|^Error(?: in .+)?: \S|Caused by: \S",
    r"Exception in thread|USER ERROR|(?-i:EXITING)|FATAL(?: ERROR)?:|fatal error|signature of method",
    r"Missing ?Input|Missing ?Output|ProtectedOutput|IncompleteFiles|AmbiguousRule|CyclicGraph",
))  # fmt: skip
_STATUS = r"(?i)\b(?:exit|return code).*[ :=(]+(?:1\d\d|255)\b"
_STRONG = f"{_CAUSE}|{_STATUS}"
_FAILURE = (
    r"(?i)(?:^|[^-\w.])errors?(?:[^-\w=]|$)|errors?:|(?-i:[a-z]Error\b)|exception|traceback|caused by|fail|fatal|cannot|"
    r"could not|unable to|not found|denied|abort|exit(?:ed)?(?: with)?(?: exit)? ?(?:status|code)|exit: [1-9]|non-zero|"
    r"command (?:error|executed|output):|work dir:|halt|undefined|killed"
)
# Lines that have such a word and report no failure; they are mentions unless they name a cause as well.
_HARMLESS = (
    r"(?i)\b(?:0|no|without|zero) (?:\w+ )?(?:errors?|failures?|failed|exceptions?)\b|"
    r"\b(?:errors?|fail(?:ed|ures?|edCount)?|exceptions?)[\"']? ?[:=] ?(?:0\b|-|none|null|false|\[\])|"
    r"error[_-]?(?:rate|strategy|model|corr|prob|profile|prone|bar)|errors? (?:rate|correct|profile|model)|"
    r"sequencing error|standard error|exit(?: ?(?:status|code))?: ?0\b|fail-?fast"
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
