"""Rendered scripts as the real sbatch reads them, and flags as the real vLLM knows them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from slurm_lab import SlurmLab, free_ports, wait_until

from biollm.client import get_model_client
from biollm.config import Cluster, Environment, Model, load_config
from biollm.config.paths import data_dir
from biollm.slurm.endpoints import Records, ask
from biollm.slurm.script import render
from biollm.slurm.vllm_flags import flags, problems, snapshot

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
    known = snapshot()["flags"]
    args = {name: kind[0] if isinstance(kind, list) else values[kind] for name, kind in known.items()} | own
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
        [vllm_env / "bin" / "python", "-c", program, *(word for flag in flags(args) for word in flag)],
        capture_output=True,
        text=True,
        cwd="/tmp",
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster, Model], Path]:
    """Write a configuration with one site and one model; return its folder."""

    def write(cluster: Cluster, model: Model) -> Path:
        folder = tmp_path / "config"
        folder.mkdir()
        entry = model.model_dump(mode="json", exclude_unset=True, exclude={"key"})
        site = dict.fromkeys(("cpus_per_node", "memory_gb_per_node", "gpu_type")) | {"exclusive": False}
        site |= cluster.model_dump(mode="json", exclude_unset=True) | {"walltime": "0:30:00"}
        for name, content in {
            "cluster": {"cluster": site},
            "models": {"models": {model.key: entry | {"type": "local"}}},
            "providers": {"inherit": False, "providers": {}},
        }.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(folder))
        return folder

    return write


def submit_by_hand(lab: SlurmLab, script: Path, *arguments: str) -> str:
    """Do what a user types: biollm render-slurm ... > job.sh; sbatch job.sh."""
    command = [str(Path(sys.executable).with_name("biollm")), "render-slurm", *arguments]
    rendered = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rendered.returncode == 0 and "login node" not in rendered.stderr, rendered.stderr
    script.write_text(rendered.stdout)
    return lab.run("sbatch", "--parsable", str(script))


def test_a_printed_script_can_be_submitted_by_hand(
    lab: SlurmLab,
    site: Cluster,
    model: Callable[..., Model],
    configure: Callable[[Cluster, Model], Path],
    tmp_path: Path,
) -> None:
    configure(site, model())
    job = submit_by_hand(lab, tmp_path / "job.sh", "m")
    records = Records(load_config().cluster)
    wait_until(lambda: records.read()[0], 30, "a server that is alive by its record")
    (endpoint,), _ = records.read()
    assert (endpoint.job, endpoint.model) == (job, "m")
    assert ask(endpoint, "POST", "/v1/completions", {"prompt": "x"}, timeout=10)[0] == 200


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plain_script_starts_vllm_and_its_last_comment_is_its_provider(
    lab: SlurmLab, vllm_env: Path, configure: Callable[[Cluster, Model], Path], tmp_path: Path
) -> None:
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment = Environment(venv=vllm_env, env=cpu)
    cluster = Cluster(name="lab", partition="gpu", run_dir=tmp_path / "run", environment=environment, walltime=1800)
    args = {"enforce_eager": True, "max_model_len": 1024}
    smollm = Model(key="m", path=vllm_env / "share" / "smollm2-135m", context_length=1024, vllm_args=args)
    (port,) = free_ports(1)
    folder, script = configure(cluster, smollm), tmp_path / "job.sh"
    job = submit_by_hand(lab, script, "m", "--plain", "--port", str(port))
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: status(f"{url}/health") == 200, 300, "vLLM")
        assert status(f"{url}/v1/models") == 401

        (key_file,) = (tmp_path / "run" / "biollm").glob("plain-*.key")
        key = key_file.read_text()
        assert key_file.stat().st_mode & 0o777 == 0o600
        assert key not in script.read_text()
        arguments = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert str(port) in arguments and key not in arguments

        comment = script.read_text().rpartition("in place of NODE:\n")[2]
        entry = "".join(line.removeprefix("#").removeprefix(" ") for line in comment.splitlines(keepends=True))
        (folder / "providers.yaml").write_text("inherit: false\n" + entry.replace("NODE", "127.0.0.1"))
        answer = get_model_client().complete("Say hello.", max_tokens=8, timeout=120)
        assert (answer.provider, bool(answer.text)) == ("plain-vllm", True)
    finally:
        lab.run("scancel", job)


def status(url: str) -> int:
    """Return the HTTP status, or 0 without an answer."""
    try:
        return urllib.request.urlopen(url, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
