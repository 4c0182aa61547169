"""Rendered scripts as the real sbatch reads them, and flags as the real vLLM knows them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from slurm_lab import SlurmLab

from biollm.config import Cluster, Model
from biollm.config.paths import data_dir
from biollm.slurm.launch import render
from biollm.slurm.vllm_flags import argv, problems, snapshot

pytestmark = pytest.mark.real
HOSTILE = [
    "two words",
    "it's",
    'say "hi"',
    "$(touch /tmp/biollm-pwned)",
    "`id`",
    "#x",
    " # x",
    "a\\b",
    "c\\",
    "100%",
    "é",
    "a;b|c",
]


def test_sbatch_reads_every_value_as_it_was_written(lab: SlurmLab, tmp_path: Path) -> None:
    for value in HOSTILE:
        folder = tmp_path / value.replace("\\", "")
        cluster = Cluster(name="lab", partition="gpu", run_dir=folder, sbatch_options=("--hold", f"--comment={value}"))
        script = tmp_path / "job.sh"
        script.write_text(render([Model(key="m", path=Path("/w"))], cluster).text)
        job = lab.run("sbatch", "--parsable", str(script))
        shown = lab.run("scontrol", "show", "job", job).splitlines()
        lab.run("scancel", job)
        said = dict(
            line.strip("\n").lstrip(" ").split("=", 1) for line in shown if "Comment=" in line or "StdOut=" in line
        )
        assert said["Comment"].rstrip(" ") == value.rstrip(" ")
        assert said["StdOut"].replace("%%", "%") == f"{folder}/logs/biollm-{job}.log"
    assert not Path("/tmp/biollm-pwned").exists()


def test_output_lands_in_a_folder_with_percent_signs(lab: SlurmLab, tmp_path: Path) -> None:
    (tmp_path / "100%j" / "logs").mkdir(parents=True)
    cluster = Cluster(name="lab", partition="gpu", run_dir=tmp_path / "100%j")
    script = tmp_path / "job.sh"
    head = render([Model(key="m", path=Path("/w"))], cluster).text.partition("\nset -eo")[0]
    script.write_text(f"{head}\necho here\n")
    job = lab.run("sbatch", "--parsable", "--wait", str(script))
    assert (tmp_path / "100%j" / "logs" / f"biollm-{job}.log").read_text() == "here\n"


def test_the_snapshot_is_what_vllm_itself_says(vllm_env: Path) -> None:
    program = Path(__file__).parent / "vllm_flags.py"
    done = subprocess.run(
        [vllm_env / "bin" / "python", program], capture_output=True, text=True, check=True, cwd="/tmp"
    )
    assert json.loads(done.stdout) == json.loads((data_dir("slurm_templates") / "vllm-flags.json").read_text())


def test_vllm_parses_our_arguments(vllm_env: Path) -> None:
    """One value for every flag, written by us, is read by vLLM's own parser."""
    values: dict[str, object] = {
        "bool": False,
        "flag": True,
        "int": 2,
        "float": 0.5,
        "tokens": "16k",
        "json": {},
        "list": ["1"],
        "str": "x",
    }
    own = {"cudagraph_capture_sizes": [1, 2], "lora_modules": ["a=b"], "collect_detailed_traces": ["all"]}
    flags = snapshot()["flags"]
    args = {name: kind[0] if isinstance(kind, list) else values[kind] for name, kind in flags.items()} | own
    wrong = dict(problems(args))
    assert {message.partition(".")[0] for message in wrong.values()} == {"is set by biollm itself", "is a secret"}
    args = {name: value for name, value in args.items() if name not in wrong}
    program = (
        "import sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [vllm_env / "bin" / "python", "-c", program, *argv(args)], capture_output=True, text=True, cwd="/tmp"
    )
    assert done.returncode == 0, done.stderr[-2000:]
