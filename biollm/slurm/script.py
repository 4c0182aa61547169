"""Renders `slurm_templates/vllm.sh.j2`, which holds the `#SBATCH` lines and the body of every launch script. Pure.

Slurm runs scripts and vLLM serves; neither knows the other. `header` makes the options after `#SBATCH`. The script ends
with `exec` of the supervisor, so that Slurm's signals reach it; what must run on the node is there, and keys are made
there. The walltime is an argument: Slurm before 23.02 does not tell a job its end.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from biollm import __version__
from biollm.config import Cluster, Model
from biollm.config.loader import sentence
from biollm.config.paths import biollm_dir, cache_dir, data_dir, log_dir, models_dir, run_dir, weights_dir
from biollm.errors import ConfigError, DoesNotFitError, Problem, UsageError, nearest
from biollm.slurm import vllm_flags
from biollm.slurm.memory import fit
from biollm.types import counted

_SECRET = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
_UNQUOTED = re.compile(r"[\w@%+=:,./\[\]*&|()-]*", re.ASCII)  # what sbatch takes without quotes
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CHECKPOINTS = ("awq", "gptq", "auto_awq", "auto_gptq", "awq_marlin", "gptq_marlin", "compressed-tensors")


@dataclass(frozen=True)
class Options:
    """Overrides of the site's and the model's settings, in seconds; None keeps those. `force` skips the check of `fit`."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    walltime: int | None = None
    drain: int | None = None
    handover: bool | None = None
    gpus: int | None = None
    idle_timeout: int | None = None
    force: bool = False


@dataclass(frozen=True)
class JobRequest:
    """What a job requests; None leaves it to Slurm. GPUs, CPUs and memory are per node, times in seconds."""

    job_name: str
    nodes: int
    gpus: int
    cpus: int | None
    memory_gb: int | None
    walltime: int  # whole minutes
    drain: int | None  # before the end of the walltime, by a signal; None sends none
    log: str  # Slurm replaces %j by the job's id
    requeue: bool = False


@dataclass(frozen=True)
class LaunchScript:
    """A script and what it requests of the cluster."""

    text: str
    request: JobRequest
    gpus: int  # of the whole job
    idle_gpus: int  # held unused, where nodes are handed out whole
    warnings: tuple[str, ...] = ()


def render(models: Sequence[Model], cluster: Cluster, options: Options | None = None) -> LaunchScript:
    """Return the script of one job that serves `models` under the supervisor, each on its own GPUs and port.

    Raises:
        DoesNotFitError: A model cannot start on its GPUs (unless `options.force`), or all on one node.
        ConfigError: A flag of vLLM or a value of the site is wrong.
        UsageError: The models and options do not go together.
    """
    options = options or Options()
    script, models, cluster = _plan(models, cluster, options)
    job = script.request
    times = [cluster.idle_timeout if model.idle_timeout is None else model.idle_timeout for model in models]
    idle = 0 if 0 in times else max(times)  # 0 is never
    if options.idle_timeout is not None:
        idle = options.idle_timeout
    command = [*wrappers(cluster, job), f'python3 {quoted(next(iter(node_files(cluster))))} "$@"']
    command.append(
        f"--cluster {cluster.name} --log-dir {shlex.quote(str(log_dir(cluster)))} --walltime {job.walltime}"
        f" --drain {job.drain} --idle-timeout {idle}" + (f" --nodes {job.nodes}" if job.nodes > 1 else "")
    )
    spread = {"nnodes": job.nodes, "distributed_executor_backend": "mp"} if job.nodes > 1 else {}
    for number, model in enumerate(models):
        gpus = model.gpus_required // job.nodes
        adapters = ",".join(name for name, _ in vllm_flags.adapters(model.vllm_args))
        block = f"--model {model.key} --gpus {gpus} --start-timeout {model.start_timeout}"
        block += f" --adapters {shlex.quote(adapters)} --" if adapters else " --"
        command += [f"--and {block}" if number else block, *_vllm_serve(model, cluster, {**spread, **model.vllm_args})]
    title = f"{', '.join(model.key for model in models)} on vLLM"
    return replace(script, text=text_of(title, cluster, job, command))


def render_plain(
    model: Model, cluster: Cluster, options: Options | None = None, *, key_file: Path, port: int = 8000
) -> LaunchScript:
    """Return a script without the supervisor, on one node: header, environment and `vllm serve`. Raises as `render`.

    The job reads the server's key from `key_file`.
    """
    script, (model,), cluster = _plan([model], cluster, options or Options())
    if script.request.nodes > 1:
        message = f"{model.key} needs {script.request.nodes} nodes: a plain script runs on one."
        raise UsageError(message, hint="Leave out --plain: the supervisor starts vLLM on every node.")
    job = replace(script.request, drain=None)
    serve = _vllm_serve(model, cluster, model.vllm_args)
    command = [*wrappers(cluster, job), *serve, "  --host 0.0.0.0", f"  --port {port}"]
    entry = {"type": "local", "priority": 5, "models": [model.key], "key_file": str(key_file)}
    entry["base_url"] = f"http://NODE:{port}/v1"
    return replace(
        script, request=job, text=text_of(f"{model.key} on vLLM", cluster, job, command, key_file=key_file, entry=entry)
    )


def _plan(models: Sequence[Model], cluster: Cluster, options: Options) -> tuple[LaunchScript, list[Model], Cluster]:
    """Return a script without text, and models and site with the options applied; all of it checked."""
    cluster = with_options(cluster, options)
    if not models or len({model.key for model in models}) < len(models):
        raise UsageError("A job serves different models.", hint="For several servers of one model: --replicas N.")
    if options.gpus and len(models) > 1:
        raise UsageError("--gpus is for a single model.", hint="Set gpus_required of each in models.yaml.")
    models = [_sized(model, options) for model in models]
    nodes = _nodes(models, cluster)
    warnings = [] if options.force else [warning for model in models for warning in _check_fit(model, cluster)]
    gpus = sum(model.gpus_required for model in models)
    job = request(cluster, "biollm-" + "+".join(model.key for model in models), nodes, gpus // nodes)
    idle = nodes * (cluster.gpus_per_node - job.gpus) if cluster.exclusive else 0
    if idle:
        warnings.append(
            f"{f'Partition {cluster.partition}' if cluster.partition else 'The partition'} hands out whole nodes: {idle} of {nodes * cluster.gpus_per_node}"
            " GPUs would be idle, and billed. Serve several models in one job (--together)."
        )
    return LaunchScript("", job, gpus, idle, tuple(warnings)), models, cluster


def with_options(cluster: Cluster, options: Options) -> Cluster:
    """Return the site, checked, with the options in place of its own settings."""
    changes = {key: getattr(options, key) for key in ("partition", "account", "qos", "walltime", "drain")}
    cluster = cluster.model_copy(update={key: value for key, value in changes.items() if value is not None})
    _check_site(cluster)
    return cluster


def node_files(cluster: Cluster) -> dict[Path, str]:
    """Return the files that a job reads, path -> text, the supervisor first; those of each version have other names."""
    folder = Path(__file__).with_name("supervisor")
    names = {"": "supervisor.py", "_auth": "auth_middleware.py", "_train": "train.py"}
    texts = {part: (folder / name).read_text() for part, name in names.items()}
    stem = f"biollm_supervisor_{sha256(''.join(texts.values()).encode()).hexdigest()[:12]}"
    return {biollm_dir(cluster) / "lib" / f"{stem}{part}.py": text for part, text in texts.items()}


def override(model: Model, assignment: str) -> Model:
    """Return `model` after one "vllm_args.max_model_len=16384"; an empty value removes the flag. Raises UsageError."""
    path, equals, text = assignment.partition("=")
    first, dot, flag = path.strip().partition(".")
    if not equals or bool(dot) != (first == "vllm_args") or (dot and not flag):
        message = f"--set {assignment!r} is not an assignment."
        raise UsageError(message, hint="Write --set vllm_args.max_model_len=16384.")
    if first not in type(model).model_fields:
        hint = nearest(first, type(model).model_fields, repr) or None
        raise UsageError(f"--set: a model has no {first!r}.", hint=hint)
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if dot:
        args: dict[str, Any] = model.vllm_args | {flag.replace("-", "_"): value}
        value = {name: each for name, each in args.items() if each is not None}
    try:
        return type(model).model_validate({**model.model_dump(exclude_unset=True), first: value})
    except ValidationError as error:
        raise UsageError(f"--set {assignment!r}: {sentence(error.errors()[0])}") from None


def _sized(model: Model, options: Options) -> Model:
    """Return `model` with checked flags, and a tensor-parallel size that matches its GPUs."""
    args = dict(model.vllm_args)
    found = list(vllm_flags.problems(args))
    published, quantization = model.architecture and model.architecture.dtype, args.get("quantization")
    if quantization in _CHECKPOINTS and published in ("bfloat16", "float16", "float32"):
        found.append(("quantization", f"is {quantization}, but {model.hf_id} is {published}: name such a checkpoint."))
    if found:
        where = f"models.{model.key}.vllm_args"
        raise ConfigError([Problem("models.yaml", 0, f"{where}.{key}", message) for key, message in found])
    gpus = model.gpus_required if options.gpus is None else options.gpus
    others = int(str(args.get("pipeline_parallel_size", 1))) * int(str(args.get("data_parallel_size", 1)))
    if gpus and (options.gpus or "tensor_parallel_size" not in args):
        args["tensor_parallel_size"] = max(1, gpus // others)
    if gpus and (size := int(str(args["tensor_parallel_size"])) * others) != gpus:
        raise UsageError(
            f"{model.key} gets {counted(gpus, 'GPU')}, but its tensor x pipeline x data parallel size is {size}.",
            hint="Make gpus_required (or --gpus) and vllm_args agree.",
        )
    return model.model_copy(update={"vllm_args": args, "gpus_required": gpus})


def _nodes(models: Sequence[Model], cluster: Cluster) -> int:
    gpus, names = sum(model.gpus_required for model in models), ", ".join(model.key for model in models)
    nodes = max(1, math.ceil(gpus / cluster.gpus_per_node))
    if nodes > 1 and len(models) > 1:
        message = f"{names} need {gpus} GPUs together; a node has {cluster.gpus_per_node}."
        raise DoesNotFitError(message, hint="Start them in several jobs.")
    if nodes > 1 and (gpus % nodes or models[0].vllm_args.get("data_parallel_size", 1) != 1):
        message = f"{names} cannot be divided among {nodes} nodes: {counted(gpus, 'GPU')}, in equal parts, no data parallelism."
        raise DoesNotFitError(message, hint=f"Choose a multiple of {nodes} GPUs.")
    return nodes


def _check_fit(model: Model, cluster: Cluster) -> Iterator[str]:
    """Yield a warning if the size of the model is unknown; raise DoesNotFitError if it cannot start."""
    if model.gpus_required and model.architecture is None:
        yield f"{model.key} has no `architecture:` in models.yaml: whether it fits its GPUs was not checked."
    elif model.gpus_required and not (report := fit(model, cluster)).fits:
        raise DoesNotFitError(
            f"{model.key} cannot start on {report.gpus} x {report.gpu_gib:g} GiB: {' '.join(report.reasons)}",
            hint=f"It would with {'; or '.join(report.suggestions) or 'other GPUs'}. --force renders it anyway.",
        )


def _check_site(cluster: Cluster) -> None:
    paths = {"run_dir": run_dir(cluster), "log_dir": log_dir(cluster), "cache_dir": cache_dir(cluster)}
    why = "contains \\ or , or : or a line break, which Slurm and containers do not take literally."
    odd = re.compile(r"[\\,:\x00-\x1f\x7f]")
    found = [(key, f"{str(path)!r} {why}") for key, path in paths.items() if odd.search(str(path))]
    for name in cluster.environment.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            found.append((f"environment.env.{name}", "is not a valid variable name."))
        elif _SECRET.search(name):
            found.append((f"environment.env.{name}", "may be a secret, and others can read the script. Remove it."))
    if found:
        raise ConfigError([Problem("cluster.yaml", 0, f"cluster.{key}", message) for key, message in found])


def request(cluster: Cluster, job_name: str, nodes: int, gpus: int) -> JobRequest:
    """Return the request of `gpus` on each of `nodes`, with their share of the node's CPUs and memory.

    A partition that hands out whole nodes gives all of both.
    """
    part = 1 if cluster.exclusive else Fraction(max(1, gpus), cluster.gpus_per_node)
    walltime = math.ceil(cluster.walltime / 60) * 60
    log = f"{str(log_dir(cluster)).replace('%', '%%')}/biollm-%j.log"
    totals = (cluster.cpus_per_node, cluster.memory_gb_per_node)
    cpus, memory = (total and max(1, int(total * part)) for total in totals)
    return JobRequest(job_name, nodes, gpus, cpus, memory, walltime, min(cluster.drain, walltime // 4), log)


def header(cluster: Cluster, job: JobRequest) -> Iterator[str]:
    """Yield the options of the job, for a line each; a control character in one raises ConfigError."""
    options: dict[str, object] = {"job-name": job.job_name, "partition": cluster.partition}
    options |= {"account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint}
    options |= {"nodes": job.nodes, "ntasks-per-node": 1}
    if job.gpus and cluster.gpu_request == "gres":
        options["gres"] = ":".join(filter(None, ("gpu", cluster.gpu_type, str(job.gpus))))
    elif job.gpus:
        options["gpus-per-node"] = job.gpus
    days, minutes = divmod(job.walltime // 60, 1440)
    options["cpus-per-task"] = job.cpus
    options["mem"] = "0" if cluster.exclusive else job.memory_gb and f"{job.memory_gb}G"
    options["time"] = (f"{days}-" if days else "") + f"{minutes // 60:02}:{minutes % 60:02}:00"
    if job.drain is not None:
        # B: to the supervisor alone; with several nodes it runs in a step, and only without B: do steps get it
        options["signal"] = f"{'B:' if job.nodes == 1 else ''}USR1@{job.drain}"
    options |= {"open-mode": "append", "output": job.log}
    yield from (f"--{key}={_quoted_for_sbatch(key, value)}" for key, value in options.items() if value is not None)
    # Clients would have left a requeued server, and `up` starts another; a training resumes.
    yield "--requeue" if job.requeue else "--no-requeue"
    if cluster.exclusive:
        yield "--exclusive"
    for option in cluster.sbatch_options:
        key, equals, value = (_quoted_for_sbatch("sbatch_options", part) for part in option.partition("="))
        yield key + equals + value


def _quoted_for_sbatch(key: str, value: object) -> str:
    """Quote for sbatch: # begins a comment, a backslash escapes even in quotes, and $ means nothing."""
    text = str(value)
    if _CONTROL.search(text):
        message = f"{text!r} contains a line break or another control character."
        raise ConfigError([Problem("cluster.yaml", 0, f"cluster.{key}", message)])
    return text if _UNQUOTED.fullmatch(text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def wrappers(cluster: Cluster, job: JobRequest) -> Iterator[str]:
    """Yield what runs the command: on each of several nodes, in the container."""
    if job.nodes > 1:
        cpus = f" --cpus-per-task={job.cpus}" if job.cpus else ""
        tasks = f"--nodes={job.nodes} --ntasks={job.nodes} --ntasks-per-node=1{cpus}"
        yield f"srun --kill-on-bad-exit=1 {tasks} --cpu-bind=none"
    if image := cluster.environment.container:
        own = dict.fromkeys(str(each(cluster)) for each in (run_dir, log_dir, cache_dir, models_dir))
        binds = [f"--bind={bind}" for bind in (*own, *cluster.environment.binds)]
        yield " ".join(map(quoted, [cluster.environment.container_command, "exec", "--nv", *binds, image]))


def _vllm_serve(model: Model, cluster: Cluster, args: dict[str, Any]) -> list[str]:
    flags = [["--served-model-name", model.key], *vllm_flags.flags(args)]
    first = ["vllm", "serve", str(weights_dir(model, cluster))]
    return [shlex.join(first), *(f"  {shlex.join(flag)}" for flag in flags)]


def text_of(
    title: str, cluster: Cluster, job: JobRequest, command: list[str], template: str = "vllm.sh.j2", **plain: Any
) -> str:
    """Return the text of a script: header, environment, command."""
    exports = {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{cache_dir(cluster)}/huggingface", "VLLM_NO_USAGE_STATS": "1"}
    exports |= {"DO_NOT_TRACK": "1", "VLLM_CACHE_ROOT": f"{cache_dir(cluster)}/vllm"}
    return (
        _templates()
        .get_template(template)
        .render(
            title=f"{title}, by biollm {__version__}",
            directives=list(header(cluster, job)),
            exports=exports | cluster.environment.env,
            cache=cache_dir(cluster),
            environment=cluster.environment,
            command=" \\\n  ".join(command),
            plain=plain,
        )
    )


@cache
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - a shell's text, not HTML: each value goes through `quote`
        loader=jinja2.FileSystemLoader(data_dir("slurm_templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quote": quoted, "json": json.dumps}
    return environment


def quoted(value: object) -> str:
    """Quote for the shell; only $NAME and ${NAME} are expanded, such as a node's own $TMPDIR."""
    parts = _VARIABLE.split(str(value))  # text, ${name}, $name, text, ...
    texts = [shlex.quote(text) if text else "" for text in parts[::3]]
    names = [f'"${{{braced or bare}}}"' for braced, bare in zip(parts[1::3], parts[2::3], strict=True)]
    return "".join(text + name for text, name in zip(texts, [*names, ""], strict=True)) or "''"
