"""Renders launch scripts: models and a site become the text of a Slurm job, with no logic in it.

Slurm runs scripts and vLLM serves; neither knows the other. What a robust script needs, and where it is:

- On the node, in `_node.py`, which the script ends with (bash loses signals in subshells): wait and true exit code,
  port, readiness, first completion, record, start timeout, key, idle watchdog, drain and stop, process groups, GPU
  slices, the barrier of several nodes. It takes the script's place (`exec`), so that Slurm's signals reach it, and
  no trap of bash can be lost.
- In the script: `set -euo pipefail` (-u only after modules and venv, which use unset variables), `--signal`,
  offline weights, caches off $HOME, `srun --kill-on-bad-exit` for several nodes, `--gpus-per-node` or typed
  `--gres`, the walltime as a number (Slurm before 23.02 tells a job no end), every value quoted.
- At submit, in `slurm`: the allowlisted environment, the successor (`--dependency=after:`), the arguments "$@".
- Nowhere: a key. Keys are made on the node. `VLLM_PORT` is vLLM's internal port, and unset.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from biollm import __version__
from biollm.config import Cluster, Model
from biollm.config.paths import data_dir
from biollm.config.site import cache_dir, log_dir, models_dir, own_dir, run_dir, weights_dir
from biollm.errors import ConfigError, DoesNotFitError, Problem, UsageError, nearest
from biollm.slurm import vllm_flags
from biollm.slurm.memory import fit
from biollm.slurm.sbatch import Request, header, request
from biollm.slurm.supervisor import node_files

_SECRET = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
_CHECKPOINTS = ("awq", "gptq", "auto_awq", "auto_gptq", "awq_marlin", "gptq_marlin", "compressed-tensors")


@dataclass(frozen=True)
class Options:
    """What one call changes; None keeps what the site and the model say. Times in seconds.

    Attributes:
        gpus: Of the one model, by its tensor-parallel size.
        force: Render even what `fit` says cannot start.
    """

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
class LaunchScript:
    """A script and what it asks of the cluster.

    Attributes:
        gpus: Of the whole job.
        idle_gpus: That the job would hold besides, where nodes are handed out whole: ask before submitting.
        warnings: One sentence each.
    """

    text: str
    request: Request
    gpus: int
    idle_gpus: int
    warnings: tuple[str, ...] = ()


def render(models: Sequence[Model], cluster: Cluster, options: Options | None = None) -> LaunchScript:
    """Return the script of one job that serves `models`, each on its own GPUs and port.

    Raises:
        DoesNotFitError: A model cannot start on its GPUs (unless `options.force`), or all on one node.
        ConfigError: A flag of vLLM or a value of the site is wrong.
        UsageError: The models and options do not go together.
    """
    options = options or Options()
    changes = {key: getattr(options, key) for key in ("partition", "account", "qos", "walltime", "drain")}
    cluster = cluster.model_copy(update={key: value for key, value in changes.items() if value is not None})
    _check_site(cluster)
    if not models or len({model.key for model in models}) < len(models) or (options.gpus and len(models) > 1):
        raise UsageError("A job serves different models, and --gpus belongs to one.", hint="More of one: --replicas N.")
    models = [_sized(model, options) for model in models]
    nodes = _nodes(models, cluster)
    warnings = [] if options.force else [warning for model in models for warning in _fits(model, cluster)]
    gpus = sum(model.gpus_required for model in models)
    job = request(cluster, "biollm-" + "+".join(model.key for model in models), nodes, gpus // nodes)
    idle = nodes * (cluster.gpus_per_node - job.gpus) if cluster.exclusive else 0
    if idle:
        warnings.append(
            f"{cluster.partition or 'The partition'} hands out whole nodes: {idle} of {nodes * cluster.gpus_per_node}"
            " GPUs would idle, and be billed. Serve several models in one job (--together)."
        )
    environment = cluster.environment
    text = _template().render(
        title=f"{', '.join(model.key for model in models)} on vLLM, by biollm {__version__}",
        directives=list(header(cluster, job)),
        login=environment.modules or environment.conda,
        exports=_exports(cluster),
        cache=cache_dir(cluster),
        environment=environment,
        command=_command(cluster, job),
        # one flag and its value a line
        spec=re.sub(r',\n {4}(?="(?!--))', ", ", json.dumps(_spec(models, cluster, job, options), indent=1)),
    )
    return LaunchScript(text, job, gpus, idle, tuple(warnings))


def override(model: Model, assignment: str) -> Model:
    """Return `model` after one "vllm_args.max_model_len=16384"; an empty value takes the flag out.

    Raises:
        UsageError: It is no such assignment, names no key of a model, or the value is wrong.
    """
    import yaml

    path, equals, text = assignment.partition("=")
    first, dot, flag = path.strip().partition(".")
    if not equals or bool(dot) != (first == "vllm_args") or (dot and not flag):
        raise UsageError(f"--set {assignment!r} is no assignment.", hint="Write --set vllm_args.max_model_len=16384.")
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
    except ValueError as error:  # pydantic's; its third line says what is wrong
        raise UsageError(f"--set {assignment!r}: {str(error).splitlines()[2].strip()}") from None


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - a shell's text, not HTML: each value goes through `quote`
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = _quoted
    return environment.from_string((data_dir("slurm_templates") / "vllm.sh.j2").read_text())


def _quoted(value: object) -> str:
    """Quote for the shell; $NAME and ${NAME} alone keep their meaning: a node's own $TMPDIR, for one."""
    parts = _VARIABLE.split(str(value))  # text, ${name}, $name, text, ...
    texts = [shlex.quote(text) if text else "" for text in parts[::3]]
    names = [f'"${{{braced or bare}}}"' for braced, bare in zip(parts[1::3], parts[2::3], strict=True)]
    return "".join(text + name for text, name in zip(texts, [*names, ""], strict=True)) or "''"


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
    rest = int(str(args.get("pipeline_parallel_size", 1))) * int(str(args.get("data_parallel_size", 1)))
    if gpus and (options.gpus or "tensor_parallel_size" not in args):
        args["tensor_parallel_size"] = max(1, gpus // rest)
    if gpus and (size := int(str(args["tensor_parallel_size"])) * rest) != gpus:
        raise UsageError(
            f"{model.key} gets {gpus} GPUs, but its tensor x pipeline x data parallel size is {size}.",
            hint="Make gpus_required (or --gpus) and vllm_args agree.",
        )
    return model.model_copy(update={"vllm_args": args, "gpus_required": gpus})


def _nodes(models: Sequence[Model], cluster: Cluster) -> int:
    """Return how many nodes the job needs.

    Raises:
        DoesNotFitError: Several models do not fit one node, or one does not divide over several.
    """
    gpus, names = sum(model.gpus_required for model in models), ", ".join(model.key for model in models)
    nodes = max(1, math.ceil(gpus / cluster.gpus_per_node))
    if nodes > 1 and len(models) > 1:
        message = f"{names} need {gpus} GPUs together; a node has {cluster.gpus_per_node}."
        raise DoesNotFitError(message, hint="Start them in several jobs.")
    if nodes > 1 and (gpus % nodes or models[0].vllm_args.get("data_parallel_size", 1) != 1):
        message = f"{names} cannot be cut into {nodes} nodes: {gpus} GPUs, in equal parts, without data parallelism."
        raise DoesNotFitError(message, hint=f"Choose a multiple of {nodes} GPUs.")
    return nodes


def _fits(model: Model, cluster: Cluster) -> Iterator[str]:
    """Yield a warning where `fit` knows nothing.

    Raises:
        DoesNotFitError: It knows that the model cannot start.
    """
    if model.architecture is None and model.gpus_required:
        yield f"{model.key} has no `architecture:` in models.yaml: nobody checked whether it fits its GPUs."
    if model.architecture is None or not model.gpus_required:
        return
    report = fit(model, cluster)
    if not report.fits:
        raise DoesNotFitError(
            f"{model.key} cannot start on {report.gpus} x {report.gpu_gib:g} GiB: {' '.join(report.reasons)}",
            hint=f"It would with {'; or '.join(report.suggestions) or 'other GPUs'}. --force renders it all the same.",
        )


def _check_site(cluster: Cluster) -> None:
    paths = {"run_dir": run_dir(cluster), "log_dir": log_dir(cluster), "cache_dir": cache_dir(cluster)}
    found = [
        (key, f"{str(path)!r} holds \\ or , or : or a line break, which Slurm and containers read as their own.")
        for key, path in paths.items()
        if re.search(r"[\\,:\x00-\x1f\x7f]", str(path))
    ]
    for name in cluster.environment.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            found.append((f"environment.env.{name}", "is no name of a variable."))
        elif _SECRET.search(name):
            found.append((f"environment.env.{name}", "may be a secret, and the script can be read. Take it out."))
    if found:
        raise ConfigError([Problem("cluster.yaml", 0, f"cluster.{key}", message) for key, message in found])


def _exports(cluster: Cluster) -> dict[str, str | None]:
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{cache_dir(cluster)}/huggingface", "VLLM_NO_USAGE_STATS": "1"}
    own |= {"DO_NOT_TRACK": "1", "VLLM_CACHE_ROOT": f"{cache_dir(cluster)}/vllm"}
    return {**own, **cluster.environment.env}


def _command(cluster: Cluster, job: Request) -> list[str]:
    command: list[str] = []
    if job.nodes > 1:
        command = ["srun", "--kill-on-bad-exit=1", f"--nodes={job.nodes}", f"--ntasks={job.nodes}"]
        command += ["--ntasks-per-node=1", *([f"--cpus-per-task={job.cpus}"] if job.cpus else [])]
        command += ["--cpu-bind=none", "--input=all"]
    if image := cluster.environment.container:
        command += [cluster.environment.container_command, "exec", "--nv"]
        own = dict.fromkeys(str(each(cluster)) for each in (run_dir, log_dir, cache_dir, models_dir))
        command += [f"--bind={bind}" for bind in (*own, *cluster.environment.binds)] + [image]
    return [*command, "python3", str(next(iter(node_files(cluster))))]


def _spec(models: Sequence[Model], cluster: Cluster, job: Request, options: Options) -> dict[str, Any]:
    times = [cluster.idle_timeout if model.idle_timeout is None else model.idle_timeout for model in models]
    idle = options.idle_timeout if options.idle_timeout is not None else max(times) * all(times)  # 0 is never
    servers: list[dict[str, Any]] = []
    for model in models:
        args = dict(model.vllm_args)
        if job.nodes > 1:
            args = {"nnodes": job.nodes, "distributed_executor_backend": "mp", **args}
        argv = ["vllm", "serve", str(weights_dir(model, cluster)), "--served-model-name", model.key]
        server = {"name": model.key, "argv": argv + vllm_flags.argv(args), "gpus": model.gpus_required // job.nodes}
        servers.append(server | {"start_timeout": model.start_timeout})
    return {
        "v": 1, "cluster": cluster.name, "run_dir": str(own_dir(cluster)), "log_dir": str(log_dir(cluster)),
        "walltime": job.walltime, "drain": job.drain, "idle_timeout": idle, "nodes": job.nodes, "models": servers,
    }  # fmt: skip
