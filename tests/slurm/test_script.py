"""Launch scripts: recorded ones, hostile values, and what is refused before a GPU waits."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from biollm import __version__
from biollm.config import Cluster, Environment, Model, load_config
from biollm.config.paths import weights_dir
from biollm.errors import ConfigError, DoesNotFitError, UsageError
from biollm.slurm.script import LaunchScript, Options, node_files, override, render, render_plain
from biollm.slurm.supervisor.supervisor import parse

GOLDEN = Path(__file__).parents[1] / "golden"
BIN = Path(sys.executable).parent
SEED = ["qwen-coder-32b", "deepseek-coder-v2", "llama-3.3-70b", "minimax-m2", "codellama-34b"]
PATHS: dict[str, Any] = {"run_dir": Path("/scratch/lab/biollm"), "models_dir": Path("/scratch/lab/models")}

CONFIG = load_config()
MODELS = {name: CONFIG.models[name] for name in SEED}
A3 = CONFIG.cluster.model_copy(update=PATHS | {"environment": Environment(venv=Path("/home/me/envs/vllm"))})
UNIVERSITY = Cluster(
    name="university", partition="gpu-a100", account="genomics", qos="long", constraint="a100&nvlink", gpu_type="a100",
    gpu_memory_gib=79.1, gpus_per_node=4, cpus_per_node=64, memory_gb_per_node=512, gpu_request="gres",
    walltime=26 * 3600, sbatch_options=("--mail-type=END", "--comment=for the lab"), **PATHS,
)  # fmt: skip
BARE = Cluster(name="bare", **PATHS)
MODULES = Environment(modules=("gcc/12", "cuda/12.8"), venv=Path("/home/me/envs/vllm"), env={"NCCL_NET": None})
APPTAINER = Environment(container="/images/vllm.sif", binds=("/data:/data:ro",), env={"NCCL_DEBUG": "WARN"})
ENVIRONMENTS = {"none": Environment(), "modules": MODULES, "conda": Environment(conda="vllm"), "apptainer": APPTAINER}
HOSTILE = [
    "two words", "it's", 'say "hi"', "$(touch pwned)", "`touch pwned`", "; touch pwned #", "a\\b", "*", "~", "é", "#x",
    "&& touch pwned", "100%", "-rf", "--and", "--",
]  # fmt: skip


def site(cluster: Cluster, environment: Environment, **changes: Any) -> Cluster:
    return cluster.model_copy(update={"environment": environment, **changes})


def custom(**changes: Any) -> Model:
    """A small model without architecture numbers."""
    values = {"key": "mine", "hf_id": "me/mine", "gpus_required": 1, **changes}
    return Model.model_construct(**(Model.model_validate({"key": "mine"}).__dict__ | values))


DEEPSEEK_V3 = MODELS["deepseek-coder-v2"].model_copy(
    update={"key": "big", "gpus_required": 16, "vllm_args": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}}
)
RECORDED = {
    **{name: ([MODELS[name]], A3, Options()) for name in SEED},
    "together": ([MODELS[n] for n in SEED if n != "deepseek-coder-v2"], A3, Options()),
    "modules": ([MODELS["llama-3.3-70b"]], site(UNIVERSITY, MODULES), Options(walltime=3600)),
    "conda": ([MODELS["codellama-34b"]], site(UNIVERSITY, ENVIRONMENTS["conda"]), Options(partition="other")),
    "apptainer": ([MODELS["codellama-34b"]], site(UNIVERSITY, APPTAINER), Options(idle_timeout=0, handover=True)),
    "multi-node": ([DEEPSEEK_V3], A3, Options()),
    "multi-node-apptainer": ([MODELS["deepseek-coder-v2"]], site(UNIVERSITY, APPTAINER), Options()),
}


PLAIN = {
    "plain": (MODELS["qwen-coder-32b"], A3),
    "plain-modules": (MODELS["llama-3.3-70b"], site(UNIVERSITY, MODULES)),
    "plain-apptainer": (MODELS["codellama-34b"], site(UNIVERSITY, APPTAINER)),
}


@pytest.mark.parametrize("name", [*RECORDED, *PLAIN])
def test_recorded_scripts(name: str) -> None:
    """RECORD=1 records them anew."""
    script = plain(*PLAIN[name]) if name in PLAIN else render(*RECORDED[name])
    text = script.text.replace(__version__, "VERSION")
    text = re.sub(r"(biollm_supervisor_)[0-9a-f]{12}", r"\1HASH", text)
    file = GOLDEN / f"{name}.sh"
    if os.environ.get("RECORD"):
        file.write_text(text)
    assert text == file.read_text()


def plain(model: Model, cluster: Cluster, **options: Any) -> LaunchScript:
    return render_plain(model, cluster, Options(**options), key_file=Path("/scratch/lab/biollm/my.key"))


def served(script: LaunchScript) -> list[argparse.Namespace]:
    """What the supervisor reads from the script's command line: a namespace for each model, the job's in the first."""
    command = script.text.partition("\nexec ")[2]
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    return parse(words[words.index("--cluster") :])


def header(script: LaunchScript) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.text.splitlines() if line.startswith("#SBATCH")]


def check(scripts: list[LaunchScript], folder: Path) -> None:
    """Have bash and shellcheck read them all."""
    files = [folder / f"{number}.sh" for number in range(len(scripts))]
    for file, script in zip(files, scripts, strict=True):
        file.write_text(script.text)
    for command in (["bash", "-n"], [str(BIN / "shellcheck"), "--severity=warning", "--exclude=SC1090,SC1091"]):
        batches = [files] if "shellcheck" in command[0] else [[file] for file in files]
        for batch in batches:
            done = subprocess.run([*command, *batch], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_bash_and_shellcheck_accept_models_by_sites_by_environments(tmp_path: Path) -> None:
    sites = [A3, UNIVERSITY, BARE, UNIVERSITY.model_copy(update={"exclusive": True, "gpu_type": None})]
    matrix = [(model, site(each, env)) for model, each, env in product(MODELS.values(), sites, ENVIRONMENTS.values())]
    one_node = [(model, each) for model, each in matrix if model.gpus_required <= each.gpus_per_node]
    check([*(render([model], each) for model, each in matrix), *(plain(*each) for each in one_node)], tmp_path)


@pytest.mark.slow
def test_hostile_values_end_as_text(tmp_path: Path) -> None:
    """The rendered scripts are run, with programs that only write down what they got."""
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name in ("python3", "apptainer", "srun"):
        (fakes / name).write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            "print(json.dumps([sys.argv, os.environ.get('VALUE'), os.environ.get('LOADED')]))\n"
        )
        (fakes / name).chmod(0o755)
    (fakes / "conda").write_text("#!/bin/bash\necho 'conda() { LOADED=$2; export LOADED; }'\n")
    (fakes / "conda").chmod(0o755)
    (tmp_path / "etc").write_text("module() { LOADED=$2; export LOADED; }\nexport -f module\n")
    scripts: list[LaunchScript] = []
    for value in [*HOSTILE, "two\nlines"]:
        venv = tmp_path / value.replace("\n", "") / "venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "activate").write_text("LOADED=$BASH_SOURCE; export LOADED")
        environments = {
            "module": Environment.model_construct(modules=(value,), env={"VALUE": value}),
            "conda": Environment.model_construct(conda=value, env={"VALUE": value}),
            str(venv / "bin" / "activate"): Environment.model_construct(venv=venv, env={"VALUE": value}),
            "apptainer": Environment.model_construct(container=value, binds=(value,), env={"VALUE": value}),
        }
        for kind, environment in environments.items():
            model = custom(path=Path("/m") / value, vllm_args={"chat_template": value, "tokenizer": f"--{value}"})
            scripts.append(render([model], site(BARE, environment, cache_dir=tmp_path / "cache")))
            argv, got, loaded = run(scripts[-1], tmp_path)
            assert got == value
            assert loaded == {"module": value, "conda": value, "apptainer": None}.get(kind, kind)
            at = argv.index("--submission")
            assert argv[at + 1] == "1 2"
            (block,) = parse(argv[at + 2 :])
            assert block.command == served(scripts[-1])[0].command
            template = [f"--chat-template={value}"] if value.startswith("-") else ["--chat-template", value]
            expected = ["vllm", "serve", str(Path("/m") / value), "--served-model-name", "mine", *template]
            assert block.command[:-2] == [*expected, f"--tokenizer=--{value}"]
            if kind == "apptainer":
                assert argv[at - 4 : at - 2] == [f"--bind={value}", value]
    assert not list(tmp_path.rglob("pwned"))
    check(scripts, tmp_path)


def run(script: LaunchScript, folder: Path) -> Any:
    """Run a script where its programs are fakes; return what the last one got."""
    file = folder / "job.sh"
    file.write_text(script.text.replace("#!/bin/bash -l", "#!/bin/bash"))
    command = ["bash", "-c", f"source {folder}/etc; exec bash {file} --submission '1 2'"]
    env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("key", "code"), [("a key", 0), ("", 78), (None, 78)])
def test_a_plain_script_starts_vllm_with_the_key_in_its_environment_or_not_at_all(
    tmp_path: Path, key: str | None, code: int
) -> None:
    """Without a key, vLLM would serve everybody who can reach the node."""
    (tmp_path / "vllm").write_text('#!/bin/bash\necho "$VLLM_API_KEY: $*"\n')
    (tmp_path / "vllm").chmod(0o755)
    if key is not None:
        (tmp_path / "my key").write_text(key)
    script = render_plain(
        custom(), site(BARE, Environment(), cache_dir=tmp_path), key_file=tmp_path / "my key", port=8001
    )
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script.text], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code
    started = "a key: serve /scratch/lab/models/me/mine --served-model-name mine"
    assert done.stdout.startswith(started) if not code else not done.stdout


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint"])
@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_stay_within_their_directive(key: str, value: str) -> None:
    script = render([custom()], BARE.model_copy(update={key: value}))
    [line] = [line for line in header(script) if line.startswith(f"--{key}=")]
    # what sbatch makes of it: a backslash escapes, quotes group, # begins a comment outside of them
    assert re.sub(r'\\(.)|"', lambda found: found[1] or "", line) == f"--{key}={value}"
    assert re.fullmatch(r'--\w+=("([^"\\]|\\.)*"|[^"\\\s#]*)', line)


@pytest.mark.parametrize("value", ["two\nlines", "#SBATCH\r--uid=0", "nul\0", "bell\a"])
@pytest.mark.parametrize("key", ["partition", "account", "gpu_type", "run_dir", "log_dir", "sbatch_options"])
def test_a_line_break_in_the_header_is_an_error(key: str, value: str) -> None:
    wrong: Any = (f"--comment={value}",) if key == "sbatch_options" else Path("/x") / value if "dir" in key else value
    with pytest.raises(ConfigError, match=rf"cluster\.(yaml: cluster\.)?({key}|gres).*line break"):
        render([custom()], UNIVERSITY.model_copy(update={key: wrong}))


def test_variables_of_the_node_are_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    local = tmp_path / "local disk"
    (tmp_path / "etc").write_text(f"export SCRATCH='{local}'")
    (tmp_path / "bin" / "python3").write_text('#!/bin/bash\necho "\\"$HF_HOME|$MORE\\""\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    environment = Environment(env={"MORE": "a${SCRATCH}b $(touch pwned)"})
    script = render([custom()], site(BARE, environment, cache_dir=Path("$SCRATCH/the cache")))
    assert run(script, tmp_path) == f"{local}/the cache/huggingface|a{local}b $(touch pwned)"


def test_no_key_is_in_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "sk-planted-0123456789")
    assert "planted" not in render([MODELS["minimax-m2"]], A3).text


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "HF_TOKEN", "DB_PASSWORD", "2ND", "A-B", "É"])
def test_a_variable_that_may_be_a_secret_is_refused(name: str) -> None:
    environment = Environment.model_construct(env={name: "x"})
    with pytest.raises(ConfigError, match=rf"environment\.env\.{name}"):
        render([custom()], site(BARE, environment))


def test_a_gpu_gets_its_share_of_cpus_and_memory() -> None:
    script = render([MODELS["llama-3.3-70b"]], A3.model_copy(update={"exclusive": False}))
    assert {"--gpus-per-node=2", "--cpus-per-task=52", "--mem=468G"} <= set(header(script))
    assert (script.gpus, script.idle_gpus, script.warnings) == (2, 0, ())


def test_idle_gpus_of_a_whole_node_are_reported() -> None:
    alone, together = render([MODELS["qwen-coder-32b"]], A3), render(*RECORDED["together"])
    assert alone.idle_gpus == 7
    assert "7 of 8 GPUs would be idle" in alone.warnings[0]
    assert {"--exclusive", "--mem=0", "--cpus-per-task=208"} <= set(header(alone))
    assert (together.gpus, together.idle_gpus, together.warnings) == (8, 0, ())
    assert [model.gpus for model in served(together)] == [1, 2, 4, 1]


def test_a_site_that_says_nothing_leaves_it_to_slurm() -> None:
    keys = {line.split("=")[0] for line in header(render([custom()], BARE))}
    assert not keys & {"--partition", "--account", "--qos", "--constraint", "--cpus-per-task", "--mem", "--gres"}


def test_without_gpus_none_are_asked_for() -> None:
    script = render(
        [custom(gpus_required=0, vllm_args={"enforce_eager": True})], A3.model_copy(update={"exclusive": False})
    )
    assert not [line for line in header(script) if "gpu" in line.split("=")[0]]
    assert served(script)[0].gpus == 0
    assert "--tensor-parallel-size" not in script.text


@pytest.mark.parametrize(
    ("seconds", "clock", "rounded", "drain"),
    [
        (300, "00:05:00", 300, 75),
        (90, "00:02:00", 120, 30),
        (8 * 3600, "08:00:00", 28800, 120),
        (26 * 3600, "1-02:00:00", 93600, 120),
    ],
)
def test_walltime_and_the_signal_before_its_end(seconds: int, clock: str, rounded: int, drain: int) -> None:
    script = render([custom()], BARE, Options(walltime=seconds))
    assert {f"--time={clock}", f"--signal=B:USR1@{drain}"} <= set(header(script))
    assert (served(script)[0].walltime, served(script)[0].drain) == (rounded, drain)


@pytest.mark.parametrize(
    ("model", "option", "expected"), [(None, None, 1800), (60, None, 60), (0, None, 0), (60, 90, 90), (60, 0, 0)]
)
def test_idle_timeout(model: int | None, option: int | None, expected: int) -> None:
    script = render([custom(idle_timeout=model)], BARE, Options(idle_timeout=option))
    assert served(script)[0].idle_timeout == expected


@pytest.mark.parametrize(("times", "expected"), [((60, 90), 90), ((60, 0), 0)])
def test_a_shared_job_is_as_patient_as_its_most_patient_model(times: tuple[int, int], expected: int) -> None:
    models = [custom(key=f"m{time}", idle_timeout=time) for time in times]
    assert served(render(models, BARE))[0].idle_timeout == expected


def test_several_nodes() -> None:
    script = render([DEEPSEEK_V3], A3)
    assert {"--nodes=2", "--gpus-per-node=8", "--signal=USR1@120"} <= set(header(script))
    assert script.gpus == 16
    assert "exec srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1" in script.text
    argv = " ".join(served(script)[0].command)
    assert "--nnodes 2 --distributed-executor-backend mp --tensor-parallel-size 8 --pipeline-parallel-size 2" in argv


def test_gpus_set_the_tensor_parallel_size() -> None:
    script = render([MODELS["llama-3.3-70b"]], A3, Options(gpus=4))
    assert script.gpus == 4
    argv = served(script)[0].command
    assert argv[argv.index("--tensor-parallel-size") + 1] == "4"


@pytest.mark.parametrize(
    ("models", "cluster", "options", "error", "says"),
    [
        (["minimax-m2"], {}, {"gpus": 2}, DoesNotFitError, "minimax-m2 cannot start on 2 x 79.1 GiB: .*GiB of weights"),
        (["qwen-coder-32b"], {"gpu_memory_gib": 39.4}, {}, DoesNotFitError, "cannot start on 1 x 39.4 GiB"),
        (["qwen-coder-32b", "deepseek-coder-v2"], {}, {}, DoesNotFitError, "need 9 GPUs together; a node has 8"),
        (["deepseek-coder-v2"], {"gpus_per_node": 3}, {}, DoesNotFitError, "cannot be divided among 3 nodes: 8 GPUs"),
        ([], {}, {}, UsageError, "different models"),
        (["qwen-coder-32b"] * 2, {}, {}, UsageError, "different models"),
        (["qwen-coder-32b", "codellama-34b"], {}, {"gpus": 2}, UsageError, "--gpus is for a single model"),
    ],
)
def test_what_cannot_start_is_refused(
    models: list[str], cluster: dict[str, Any], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        render([MODELS[name] for name in models], A3.model_copy(update=cluster), Options(**options))


def test_force_renders_what_does_not_fit() -> None:
    model = MODELS["minimax-m2"]
    with pytest.raises(DoesNotFitError) as raised:
        render([model], A3, Options(gpus=2))
    assert "more GPUs (tensor_parallel_size: 4)" in str(raised.value.hint)
    assert render([model], A3, Options(gpus=2, force=True)).gpus == 2


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"vllm_args": {"max_model_leng": 1}},
            ConfigError,
            r"models\.mine\.vllm_args\.max_model_leng: .*max_model_len",
        ),
        ({"vllm_args": {"tensor_parallel_size": 2}}, UsageError, "mine gets 1 GPU, but .* size is 2"),
        ({"vllm_args": {"tensor_parallel_size": 2}, "gpus_required": 4}, UsageError, "mine gets 4 GPUs"),
        ({"hf_id": None}, UsageError, "mine is not a local model"),
        ({"type": "api"}, UsageError, "mine is not a local model"),
    ],
)
def test_a_wrong_model_is_refused(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        render([custom(**changes)], BARE)


def test_a_quantisation_that_the_checkpoint_does_not_have_is_refused() -> None:
    model = override(MODELS["codellama-34b"], "vllm_args.quantization=awq")
    with pytest.raises(ConfigError, match=r"is awq, but codellama/.* is bfloat16"):
        render([model], A3)


def test_a_model_of_unknown_size_is_rendered_with_a_warning() -> None:
    assert "was not checked" in render([custom()], BARE).warnings[0]


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("vllm_args.max_model_len=16384", "max_model_len", 16384),
        ("vllm_args.max-model-len=16k", "max_model_len", "16k"),
        ("vllm_args.enforce_eager=true", "enforce_eager", True),
        ('vllm_args.hf_overrides={"a": [1]}', "hf_overrides", {"a": [1]}),
        ("vllm_args.chat_template=a=b: {{", "chat_template", "a=b: {{"),
        ("vllm_args.dtype=", "dtype", None),
    ],
)
def test_overrides(assignment: str, key: str, value: object) -> None:
    model = override(MODELS["codellama-34b"], assignment)
    assert model.vllm_args.get(key) == value
    assert model.architecture == MODELS["codellama-34b"].architecture


def test_other_keys_can_be_overridden() -> None:
    assert override(MODELS["codellama-34b"], "start_timeout=90 min").start_timeout == 5400
    assert weights_dir(override(MODELS["codellama-34b"], "path=/fast/codellama"), A3) == Path("/fast/codellama")


@pytest.mark.parametrize("assignment", ["vllm_args", "vllm_args=1", "vllm_args.=1", "=1", "gpu=2", "gpus_required=two"])
def test_wrong_overrides(assignment: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        override(MODELS["codellama-34b"], assignment)


def test_weights_are_found_by_repository_and_revision() -> None:
    assert weights_dir(custom(), A3) == Path("/scratch/lab/models/me/mine")
    assert weights_dir(custom(revision="refs/pr/1"), A3) == Path("/scratch/lab/models/me/mine@refs_pr_1")
    assert weights_dir(custom(path=Path("/w")), A3) == Path("/w")


def test_the_script_names_the_node_file_by_its_content() -> None:
    supervisor, middleware, train = node_files(A3)
    assert str(supervisor) in render([custom()], A3).text
    assert middleware.name == f"{supervisor.stem}_auth.py"
    assert train.name == f"{supervisor.stem}_train.py"
    assert supervisor.stem.isidentifier()  # vLLM imports the middleware by name


def test_speed() -> None:
    render([MODELS["minimax-m2"]], A3)
    began = time.process_time()
    for _ in range(100):
        for model in MODELS.values():
            render([model], A3)
    assert time.process_time() - began < 2
