"""The 24 logs of examples/diagnosis, each inside a longer log of its kind, up to 100 MB, and the line that names its cause."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[2] / "examples" / "diagnosis"
STEPS = ("FASTQC", "TRIMGALORE", "ALIGN_STAR:STAR_ALIGN", "SAMTOOLS_SORT", "SALMON_QUANT", "QUALIMAP_RNASEQ")


def nextflow(n: int, r: random.Random) -> str:
    at = f"Nov-14 {9 + n // 3600 % 12:02d}:{n // 60 % 60:02d}:{n % 60:02d}.{r.randrange(1000):03d}"
    name, work = (
        f"NFCORE_RNASEQ:RNASEQ:{r.choice(STEPS)} (S{n % 900:03d})",
        f"{r.getrandbits(8):02x}/{r.getrandbits(80):020x}",
    )
    return r.choice((
        f"{at} [Task monitor] DEBUG n.processor.TaskPollingMonitor - Task completed > TaskHandler[jobId: {44103 + n}; id: {n};"
        f" name: {name}; status: COMPLETED; exit: 0; error: -; workDir: /scratch/abo/rnaseq/work/{work} started: {n}; ]",
        f"{at} [Task submitter] INFO  nextflow.Session - [{work[:9]}] Submitted process > {name}",
        f"{at} [Task submitter] DEBUG n.executor.GridTaskHandler - [SLURM] submitted process {name} > jobId: {44103 + n}",
        f"{at} [Actor Thread {n % 40}] DEBUG n.processor.TaskProcessor - Process {name} > errorStrategy: retry; attempt: 1",
    ))  # fmt: skip


def failures(n: int, r: random.Random) -> str:
    """Failures that are not the cause: tasks that are ended because another has failed."""
    at = f"Nov-14 10:{n // 60 % 60:02d}:{n % 60:02d}.{r.randrange(1000):03d}"
    return f"{at} [main] ERROR n.executor.GridTaskHandler - Failed to cancel job {44103 + n} of {r.choice(STEPS)} (S{n % 900})"


def snakemake(n: int, r: random.Random) -> str:
    sample = f"S{r.randrange(400):03d}"
    return (
        f"[Wed Nov 19 21:{n // 60 % 60:02d}:{n % 60:02d} 2025]\nrule bwa_mem:\n    input: data/{sample}_R1.fastq.gz, ref/genome.fa\n"
        f"    output: results/mapped/{sample}.bam\n    jobid: {n}\n    wildcards: sample={sample}\n    threads: 8\n"
        f"    resources: mem_mb=16000, tmpdir=/tmp\n\nFinished job {n}.\n{n} of 90000 steps ({n // 900}%) done"
    )


def decoys(n: int, r: random.Random) -> str:
    return r.choice((
        f"2025-11-25 10:{n % 60:02d}:03,500 WARNING qc: S{n % 900}: error_rate=0.0{r.randrange(99):02d} is above 0.01",
        f"2025-11-25 10:{n % 60:02d}:04,120 INFO qc: read {n}: 0 errors, 0 failed, no exceptions",
        f"2025-11-25 10:{n % 60:02d}:05,330 DEBUG run: --errorStrategy ignore --error-profile illumina{n % 7} exit code: 0",
        f"2025-11-25 10:{n % 60:02d}:05,900 WARNING qc: deprecated option, failed=0, errors: 0, retries {n}",
    ))  # fmt: skip


def gatk(n: int, r: random.Random) -> str:
    return f"{n // 3600 % 24:02d}:{n // 60 % 60:02d}:{n % 60:02d}.774 INFO  ProgressMeter - chr{n % 22 + 1}:{r.randrange(10**8)} {n / 60:.1f} {n * 12804} 12804.3"


def star(n: int, r: random.Random) -> str:
    return f"{n}\t{r.randrange(25)}\t{r.randrange(28507377, 248956422)}\t{r.random():.6f}"


def bar(n: int, r: random.Random) -> str:
    return f"\rmapping:  {n % 101:3d}%|{'█' * (n % 101 // 5):20}| {n}/900000 [{n // 60:02d}:{n % 60:02d}<10:00, {r.random() * 90:.2f}it/s]"


def colour(n: int, r: random.Random) -> str:
    return f"\x1b[2m10:{n % 60:02d}:{r.randrange(60):02d}\x1b[0m \x1b[32mINFO\x1b[0m \x1b]8;;http://x\x07step {n}\x1b]8;;\x07 of {r.choice(STEPS)} done"


def training(n: int, r: random.Random) -> str:
    return f"Epoch {n // 800}, step {n}: train loss {r.random():.4f}, {r.random() * 9:.2f} s"


def prose(n: int, r: random.Random) -> str:
    return " ".join(
        r.choice(("counts", "sample", "of", "genes", "with", "model", "fits", "zwölf", "µm")) for _ in range(14)
    )


def one_line(n: int, r: random.Random) -> str:
    return f'{{"read": "r{n}", "position": {r.randrange(10**8)}, "quality": {r.random():.4f}}}, '


class Log(NamedTuple):
    """A log of `size` bytes: the file `name` after a share `place` of `filler`, and the line that names the cause."""

    name: str
    names_cause: str
    size: int
    filler: Callable[[int, random.Random], str]
    place: float

    def chunks(self) -> Iterator[bytes]:
        """Yield the log, the same each time."""
        before, joint = int(self.size * self.place), b"" if self.filler is one_line else b"\n"
        core = (FOLDER / self.name).read_bytes()
        if not joint:
            core = core.replace(b"\n", b" ")
        filler = list(self._filler())
        yield from self._sized(filler, before)
        yield joint + core + joint
        yield from self._sized(filler, self.size - before)

    def _filler(self) -> Iterator[bytes]:
        r, join = random.Random(self.name), "" if self.filler in (one_line, bar) else "\n"
        for start in range(0, 20_000, 1000):  # a few megabytes, then again
            lines = join.join(self.filler(n, r) for n in range(start, start + 1000))
            yield (lines + join).encode()
            if start * 80 > self.size:
                return

    @staticmethod
    def _sized(filler: list[bytes], size: int) -> Iterator[bytes]:
        number = 0
        while size > 0:
            chunk = filler[number % len(filler)][:size]
            if len(chunk) == size:  # the last: whole lines
                chunk = chunk[: max(chunk.rfind(b"\n"), chunk.rfind(b"\r"), chunk.rfind(b", ") + 1) + 1]
                size = 0
            yield chunk
            size -= len(chunk)
            number += 1


KB, MB = 1000, 1_000_000
LOGS = (
    Log("nextflow_oom.log", "74 Killed ", 31 * MB, nextflow, 0.9),
    Log("nextflow_no_file.log", "NoSuchFileException: /data/projects/wgs/fastq/S07_R2", 2 * MB, nextflow, 0.5),
    Log("nextflow_resources.log", "requirement exceeds available memory -- req: 36 GB", 100 * KB, nextflow, 1.0),
    Log("nextflow_container.log", "manifest unknown: salmon:1.10.1", 31 * MB, failures, 0.02),
    Log("nextflow_command.log", "line 2: bwa-mem2: command not found", 8 * MB, failures, 0.5),
    Log("snakemake_missing_input.log", "MissingInputException in rule bwa_mem", 10 * KB, snakemake, 1.0),
    Log("snakemake_truncated.log", 'S11.bam": truncated file', 5 * MB, snakemake, 0.3),
    Log("snakemake_locked.log", "Directory cannot be locked", 50 * KB, snakemake, 0.0),
    Log("slurm_time.out", "CANCELLED AT 2025-11-21T06:00:11 DUE TO TIME LIMIT", 20 * MB, gatk, 1.0),
    Log("slurm_oom.out", "Detected 1 oom_kill event", 12 * MB, colour, 0.7),
    Log("slurm_node_fail.out", "DUE TO NODE FAILURE", 40 * MB, training, 0.5),
    Log("slurm_account.log", "Invalid account or account/partition combination", 200 * KB, snakemake, 0.6),
    Log("lmod_module.out", 'module(s) are unknown: "samtools/1.21"', 1 * MB, decoys, 0.0),
    Log("python_keyerror.log", "KeyError: 'sample_id'", 15 * MB, decoys, 0.5),
    Log("python_cuda.log", "CUDA out of memory. Tried to allocate 9.20 GiB", 3 * MB, bar, 1.0),
    Log("python_import.log", "No module named 'pysam'", 400 * KB, snakemake, 0.4),
    Log("r_package.Rout", "there is no package called", 20 * KB, prose, 1.0),
    Log("r_counts.Rout", "ncol(countData) == nrow(colData) is not TRUE", 6 * MB, prose, 0.5),
    Log("picard_quota.log", "java.io.IOException: Disk quota exceeded", 100 * MB, gatk, 0.5),
    Log("gatk_contigs.log", "incompatible contigs: No overlapping contigs found", 10 * MB, decoys, 0.2),
    Log("star_sort.log", "not enough memory for BAM sorting", 60 * MB, star, 0.5),
    Log("bash_unbound.out", "STAR_INDEX: unbound variable", 100 * MB, bar, 0.5),
    Log("download.log", "Connection reset by peer, errno 104", 700 * KB, bar, 1.0),
    Log("samtools_disk.log", "No space left on device", 31 * MB, one_line, 0.5),
)

_PEAK = """
import re, sys
from pathlib import Path
from biollm.inputs.condense import scan
from biollm.inputs.finds import has_finds

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

has_finds("")
before = peak()
chunk = (sys.argv[1].encode("latin-1") * 100_000)[:1_000_000]
assert scan((chunk for _ in range(int(sys.argv[2]))), "x").cut(128_000).text
print(peak() - before)
"""


def memory(line: str, megabytes: int) -> float:
    """Return the megabytes of memory that it takes to condense this line over and over, in a process of its own."""
    command = [sys.executable, "-c", _PEAK, line, str(megabytes)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
