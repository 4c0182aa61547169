"""One failure of two runs becomes one text; two failures stay two."""

from __future__ import annotations

import re
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from biollm.client import UsageError, normalize_log
from biollm.inputs.normalize_log import RULES, names_of

LOGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "examples" / "diagnosis").iterdir()
    if path.stem not in ("compare", "expected")
)
OOM = next(path.read_text() for path in LOGS if path.name == "nextflow_oom.log")
NOT_FOUND = "FileNotFoundError: [Errno 2] No such file or directory: '/data/ref/{}'"

PAIRS = [
    ("2026-11-24 10:15:01,123 ERROR x", "2026-11-25T07:00:59Z ERROR x"),
    ("[Tue Nov 24 10:15:01 CET 2026] x", "[Wed Nov  4 08:15:01 CEST 2026] x"),
    ("24/Nov/2026:10:15:01 +0100 x", "03/Dec/2026:10:15:01 +0000 x"),
    ("Nov-24 10:15:01.123 [main] x", "Dec-01 23:59:01.001 [main] x"),
    ("started 10:15:01 PM, took 0:03:12.5", "started 9:00:59 AM, took 12:03:12"),
    ("Job failed on cn044, 8 CPUs", "Job failed on node-17.cluster, 8 CPUs"),
    ("WorkflowStats[succeededCount=11; failedCount=1]", "WorkflowStats[succeededCount=4; failedCount=2]"),
    ("elapsed 5m 3s, 12.5 seconds", "elapsed 11m 59s, 3 seconds"),
    ("slurmstepd: error: *** JOB 483 ON gpu07 CANCELLED AT 2026-11-24T10:15:01 DUE TO TIME LIMIT ***",
     "slurmstepd: error: *** JOB 99483 ON cpu12-r3 CANCELLED AT 2026-12-01T00:15:01 DUE TO TIME LIMIT ***"),
    ("error: Detected 1 oom_kill event in StepId=4837213.batch", "error: Detected 1 oom_kill event in StepId=9.0"),
    ("line 9: 218811 Killed   python", "line 9:   74 Killed   python"),
    ("Out of memory: Killed process 8123 (STAR) total-vm:33554432kB, anon-rss:31981234kB",
     "Out of memory: Killed process 913 (STAR) total-vm:3344kB, anon-rss:3198kB"),
    ("at 0x7f12ab thread 12", "at 0x55d0ff1 thread 3"),
    ("[ab/12cd34] STAR (3) failed", "[0f/9e8d7c] STAR (41) failed"),
    ("Launching `main.nf` [angry_curie] DSL2", "Launching `main.nf` [cheesy_volta] DSL2"),
    ("/scratch/ann/p/work/ab/12cd3456/x.bam", "/gpfs/bob/work/0f/9e8d7c11/x.bam"),
    ("/home/ann/x.fa: no such file", "/home/bob.b/x.fa: no such file"),
    ("/tmp/nxf.Xy12/in.bam and tmpab12cd9x", "/tmp/nxf.Zz99/in.bam and tmpQQ12cd9y"),
    ("/data/run_12/in.bam", "/data/run-2026b/in.bam"),
    ("see slurm-4837213_4.out", "see slurm-11.out"),
    ("hostname: node-17.cluster.org", "hostname: n042"),
    ("refused by 10.1.2.3:8080", "refused by 192.168.0.9:80"),
    ("read 640004 sequences (80,000,110 bp)", "read 123456 sequences (1,234,567 bp)"),
    ("commit 8f3a1bc failed, run 123e4567-e89b-12d3-a456-426614174000",
     "commit 77aa0e1d2 failed, run 00000000-e89b-12d3-a456-426614174999"),
    ("\x1b[31mERROR\x1b[0m   x  \n", "ERROR x\n"),
]  # fmt: skip


def oom_of_another_run() -> str:
    """The OOM of another sample, on another day, for another user."""
    text = OOM.replace("KO_REP2", "tumor_7").replace("/scratch/abo/rnaseq/", "/scratch/xy/")
    for old, new in (
        ("Nov-14", "Dec-02"), ("Nov 14", "Dec  2"), ("2025-11-14T09:02", "2025-12-02T11:31"), (" 10:0", " 23:1"), ("5f/a3d1c71d0b", "9a/77bc01f2e3"),
        ("4410311", "5123"), ("id: 14", "id: 9"), ("    74 Killed", "   1203 Killed"), ("Finalizer-3", "Finalizer-11"), ("1763110641", "1764700141"),
    ):  # fmt: skip
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_what_differs_between_runs_is_replaced(one: str, other: str) -> None:
    assert one != other
    assert normalize_log(one) == normalize_log(other)


def test_the_same_failure_of_two_samples_meets_once_the_samples_are_named() -> None:
    other = oom_of_another_run()
    assert normalize_log(OOM) != normalize_log(other)
    assert normalize_log(OOM, ["KO_REP2"]) == normalize_log(other, ["tumor_7"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("exit status (137)", "exit status (139)"),
        ("STAR: fatal error", "salmon: fatal error"),
        ("Process `STAR (2)` failed", "Process `SALMON (2)` failed"),
        (NOT_FOUND.format("genome.fa"), NOT_FOUND.format("genes.gtf")),
        (NOT_FOUND.format("hg38/genome.fa"), NOT_FOUND.format("mm10/genome.fa")),
        ("aligned on hg38", "aligned on mm10"),
        ("GATK 4.5.0.0", "GATK 4.6.1.0"),
        ("python 3.11.2", "python 3.9.18"),
        ("signal 9", "signal 11"),
        ("HTTP 401", "HTTP 429"),
        ("no space left on /tmp", "no space left on /scratch"),
        ("line 12 of x.nf", "line 48 of x.nf"),
        ("the file was not found", "the file was found"),
        ("tumor <name1>, normal <name2>", "tumor <name2>, normal <name1>"),
    ],
)
def test_what_makes_another_failure_stays(one: str, other: str) -> None:
    assert normalize_log(one) != normalize_log(other)


def test_of_24_failures_none_becomes_another() -> None:
    assert len(LOGS) == 24
    found = {path.name: normalize_log(path.read_text()) for path in LOGS}
    for one, other in combinations(found, 2):
        assert found[one] != found[other]
    for text in found.values():
        assert normalize_log(text) == text


def test_exit_statuses_tools_and_file_names_stay() -> None:
    kept = normalize_log(OOM)
    for words in ("exit status (137)", "STAR_ALIGN", "Killed", "--genomeDir star", "24.04.4", ".command.sh: line 11"):
        assert words in kept, words


def test_names_are_numbered_and_end_at_letters_and_digits() -> None:
    text = "T1_R1.fq and T1.bam, not T12 or XT1, but (N1) and T1-b"
    assert (
        normalize_log(text, ["T1", "N1", "T1-b"])
        == "<name1>_R1.fq and <name1>.bam, not T12 or XT1, but (<name2>) and <name3>"
    )
    assert normalize_log("x", [""]) == "x"
    with pytest.raises(UsageError, match="list"):
        normalize_log("x", "tumor_7")


def test_the_names_of_a_key_are_found() -> None:
    assert names_of(normalize_log) == []
    assert names_of(partial(normalize_log, names=["a"])) == ["a"]
    assert names_of(partial(partial(normalize_log), names=("a",))) == ["a"]
    assert names_of(partial(normalize_log, "text")) is None
    assert names_of(str.lower) is None


@pytest.mark.parametrize("what", [what for what, _, _ in RULES])
def test_each_rule_is_needed(what: str) -> None:
    others = [(re.compile(pattern), new) for name, pattern, new in RULES if name != what]

    def without(text: str) -> str:
        for pattern, new in others:
            text = pattern.sub(new, text)
        return text

    pairs = [*PAIRS, (OOM, oom_of_another_run().replace("tumor_7", "KO_REP2"))]
    assert any(without(one) != without(other) for one, other in pairs)
