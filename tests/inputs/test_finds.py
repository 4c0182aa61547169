"""Lines that name a cause, lines that report a failure, and lines that only look like it."""

from __future__ import annotations

import pytest

from biollm.inputs.finds import CAUSE, FAILURE, STATUS, has_finds, shape, shorten, weigh

CAUSES = """\
CondaHTTPError: HTTP 000 CONNECTION FAILED for url <https://conda.anaconda.org/bioconda/linux-64/repodata.json>
PackagesNotFoundError: The following packages are not available from current channels:
LibMambaUnsatisfiableError: Encountered problems while solving:
2024-02-01 ERROR    Command failed: Unable to detect chemistry
[E::hts_open_format] Failed to open file "x.bam" : No such file or directory
samtools view: failed to open "x.bam" for reading: No such file or directory
[bwa_index] fail to open file 'ref.fa' : No such file or directory
Error: error writing output: Broken pipe
gzip: stdin: unexpected end of file
gzip: /data/x.fastq.gz: not in gzip format
java.lang.OutOfMemoryError: Java heap space
OpenJDK 64-Bit Server VM warning: INFO: os::commit_memory failed; error='Not enough space' (errno=12)
There is insufficient memory for the Java Runtime Environment to continue.
slurmstepd: error: Exceeded job memory limit
slurmstepd: error: Detected 2 oom_kill events in StepId=1.batch
srun: error: cn01: task 3: Out Of Memory
srun: error: cn01: tasks 0-3: Killed
srun: error: Unable to create step for job 12: Job/step already completing or completed
sbatch: error: Batch job submission failed: Requested node configuration is not available
slurmstepd: error: execve(): python3: No such file or directory
slurmstepd: error: couldn't chdir to `/scratch/x': No such file or directory: going to /tmp instead
/bin/bash: /lib64/libc.so.6: version `GLIBC_2.34' not found (required by ./x)
./tool: error while loading shared libraries: libhts.so.3: cannot open shared object file: No such file or directory
bash: line 1: 12345 Segmentation fault      (core dumped) ./tool
*** glibc detected *** double free or corruption (!prev)
  what():  basic_string::substr: __pos (which is 5) > this->size() (which is 3)
Assertion `x > 0' failed.
thread 'main' panicked at src/main.rs:5:10:
RuntimeError: CUDA error: no kernel image is available for execution on the device
torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1691
RuntimeError: DataLoader worker (pid 12) is killed by signal: Killed.
OSError: [Errno 28] No space left on device
OSError: [Errno 122] Disk quota exceeded
PermissionError: [Errno 13] Permission denied: '/data'
FileNotFoundError: [Errno 2] No such file or directory: 'x.csv'
UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0
AttributeError: module 'numpy' has no attribute 'bool'
ValueError: could not convert string to float: 'NA'
json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)
pandas.errors.ParserError: Error tokenizing data. C error: Expected 5 fields in line 3, saw 6
Error in `[.data.frame`(x, , "a") : undefined columns selected
Error in eval(expr, envir) : object 'foo' not found
Error: cannot allocate vector of size 10.2 Gb
Error: package or namespace load failed for 'Seurat' in dyn.load(file, DLLpath = DLLpath, ...):
Error in h5checktypeOrOpenLoc(): Cannot open file
Process `X` input file name collision -- There are multiple input files for each of the following file names: a.txt
Missing output file(s) `*.bam` expected by process `ALIGN (1)`
ERROR ~ No such variable: foo
WARN: Input tuple does not match input set cardinality
Unknown method invocation `fromPath` on null type
Not a valid project name: nf-core/foo
Cannot find revision `x` -- Make sure that it exists in the remote repository
ERROR: Validation of pipeline parameters failed!
* --input: string [samples.csv] does not match pattern
Unable to acquire lock on session with ID 1234
Job 123 cancelled: DUE TO PREEMPTION
AmbiguousRuleException:
ProtectedOutputException in rule a:
IncompleteFilesException:
MissingOutputException in rule x in file Snakefile, line 3:
cp: cannot stat 'x': No such file or directory
mv: cannot move 'a' to 'b': Permission denied
curl: (6) Could not resolve host: ftp.ebi.ac.uk
wget: unable to resolve host address 'x'
ssh: connect to host x port 22: Connection timed out
fatal: unable to access 'https://github.com/x': Could not resolve host
cannot connect to X server
docker: Error response from daemon: pull access denied for x
FATAL:   could not open image /x.sif: failed to retrieve path
INFO:    Could not find any nv files on this host!
ERROR: Reads file does not look like a FASTQ file
ERROR: the read ID of R1 and R2 is different
Command terminated by signal 9
Stale file handle
Bus error
Illegal instruction
Killed
Terminated
Aborted (core dumped)
Segmentation fault
Quota exceeded
"""

STATUSES = """\
Return code: 137
Process `ALIGN (1)` terminated with an error exit status (137)
Command exit status: 137
status: COMPLETED; exit: 139; error: -;
"""

FAILURES = """\
[error] Pipestance failed. Error log at:
srun: error: cn01: task 0: Exited with exit code 1
sbatch: error: QOSMaxSubmitJobPerUserLimit
Execution halted
WildcardError in line 3 of Snakefile:
ChildIOException:
CreateCondaEnvironmentException:
tar: Exiting with failure status due to previous errors
make: *** [Makefile:3: all] Error 2
License checkout failed
exit status: 1
returned non-zero exit status 2.
FAILED: task 3
[FAIL] test_x
"""

HARMLESS = """\
Nov-14 10:00:00 [Task monitor] DEBUG Task completed > TaskHandler[id: 1; status: COMPLETED; exit: 0; error: -; workDir: /x]
fastp: error_rate=0.013 is above 0.01
0 errors, 0 failed, no exceptions
--errorStrategy retry --maxRetries 3
errors: 0
failed=0
Completed without errors
exit code: 0
exit status: 0
bowtie2 --local --no-unal -k 5 --fail-fast
INFO: sequencing error profile learned
WorkflowStats[succeededCount=11; failedCount=0; ignoredCount=0; ]
pool 'FileTransfer' minSize=10; workQueue=LinkedBlockingQueue[10000]; allowCoreThreadTimeout=false
step 137 of 255 is done
"""


@pytest.mark.parametrize("line", CAUSES.splitlines())
def test_a_line_that_names_a_cause(line: str) -> None:
    assert has_finds(line) and weigh(line) == CAUSE


@pytest.mark.parametrize("line", STATUSES.splitlines())
def test_a_line_with_the_exit_status_of_a_signal(line: str) -> None:
    assert has_finds(line) and weigh(line) == STATUS


@pytest.mark.parametrize("line", FAILURES.splitlines())
def test_a_line_that_reports_a_failure(line: str) -> None:
    assert has_finds(line) and weigh(line) == FAILURE


@pytest.mark.parametrize("line", HARMLESS.splitlines())
def test_a_line_that_reports_none(line: str) -> None:
    assert not has_finds(line) or weigh(line) < FAILURE


def test_lines_that_differ_in_numbers_times_hashes_and_bars_have_one_shape() -> None:
    one = "10:02:11 [5f/a3d1c7] mapping  9%|█         | 12/900 1.5it/s"
    assert (
        shape(one) == shape("23:59:59 [00/bbbbbb] mapping 80%|████████  | 880/900 20.25it/s") != shape("mapping done")
    )


@pytest.mark.parametrize("width", [240, 500, 2000])
def test_a_long_line_is_cut_to_its_beginning_its_end_and_its_first_and_last_find(width: int) -> None:
    middle = "step " * 400
    line = f"begin {middle} Killed {middle} No space left on device {middle} end"
    short = shorten(line, width)
    assert len(short) < width + 4 * 50
    assert short.startswith("begin ") and short.endswith(" end") and "Killed" in short
    assert ("No space left on device" in short) == (width > 400)
    assert shorten(short[:width], width) == short[:width]
