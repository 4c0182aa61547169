"""Trains a LoRA adapter of a local model as a Slurm job: its memory, its script, its submission.

TRL and PEFT train; neither says before a GPU is there what memory it needs, nor knows the walltime. The job runs
`supervisor/train.py`, which saves a checkpoint before the walltime ends; it requeues itself, and resumes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from biollm._files import write_private
from biollm.config import Cluster, Model
from biollm.config.paths import weights_dir
from biollm.errors import DoesNotFitError, UnavailableError, UsageError
from biollm.slurm import jobs, script
from biollm.slurm.memory import GIB, OVERHEAD_GIB, adapter_parameters, architecture
from biollm.slurm.script import LaunchScript, Options
from biollm.slurm.submissions import Job
from biollm.types import counted


@dataclass(frozen=True)
class Training:
    """What is trained and how: `batch` sequences of at most `length` tokens a step. `output` gets the adapter."""

    name: str
    data: Path
    output: Path
    rank: int = 16
    length: int = 2048
    epochs: float = 3.0
    learning_rate: float = 2e-4
    batch: int = 8


# What takes memory, as docs/tuning.md explains it, with sources; not measured on a GPU.
ASSUMPTIONS = (
    "weights: 2 bytes per parameter, frozen",
    "adapter: all linear layers, 16 bytes per parameter: weight, gradient and two moments of Adam in 32 bits",
    "activations: one sequence, gradient checkpointing: 2 bytes x layers, and 34 of the layer that is recomputed",
    "logits: 10 bytes per token and word of the vocabulary",
    f"runtime: {OVERHEAD_GIB:g} GiB; several GPUs share all but logits and runtime",
)


def memory(model: Model, cluster: Cluster, rank: int, length: int, gpus: int | None) -> tuple[int, dict[str, float]]:
    """Return the GPUs, the fewest of a node that hold the training unless given, and the GiB of each by what takes it.

    Raises:
        DoesNotFitError: The model's size is unknown, its weights are quantized, or they do not fit.
    """
    arch = architecture(model)
    if arch.dtype not in ("bfloat16", "float16", "float32"):
        message = f"{model.key} is published with quantized weights: its training cannot be sized."
        raise DoesNotFitError(message, hint="Choose a 16-bit model.")
    if (gpus or 0) > cluster.gpus_per_node:
        raise DoesNotFitError(
            f"A node has {counted(cluster.gpus_per_node, 'GPU')}, not {gpus}, and training uses one node."
        )
    sizes = {"weights": 2 * arch.parameters, "adapter": 16 * adapter_parameters(arch, rank)}
    sizes["activations"] = (2 * arch.layers + 34) * length * arch.hidden
    once = {"logits": 10 * length * arch.vocab / GIB, "runtime": OVERHEAD_GIB}
    count, parts = 0, once
    for count in [gpus] if gpus else range(1, cluster.gpus_per_node + 1):
        parts = {what: size / GIB / count for what, size in sizes.items()} | once
        if sum(parts.values()) <= cluster.gpu_memory_gib:
            return count, parts
    need = f"{sum(parts.values()):.1f} GiB per GPU on {counted(count, 'GPU')} of {cluster.gpu_memory_gib:g} GiB"
    hint = f"Try a shorter --length, {'more --gpus ' if count < cluster.gpus_per_node else ''}or a smaller model."
    raise DoesNotFitError(f"Training {model.key} needs {need}.", hint=hint)


def render(model: Model, cluster: Cluster, training: Training, options: Options) -> LaunchScript:
    """Return the script of the job that trains an adapter of `model`; raises as `memory` and `script.render` do."""
    gpus = model.gpus_required if options.gpus is None else options.gpus
    if model.architecture and gpus:
        gpus, _ = memory(model, cluster, training.rank, training.length, options.gpus)
    cluster = script.with_options(cluster, options)
    job = replace(script.request(cluster, f"biollm-tune-{training.name}", 1, gpus), requeue=True)
    values = {"model": weights_dir(model, cluster)} | vars(training)
    words = [f"  --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in values.items()]
    program = script.quoted([*script.node_files(cluster)][-1])
    command = [*script.wrappers(cluster, job), f'python3 {program} "$@"', *words]
    title = f"{training.name}, a LoRA adapter of {model.key}, trained"
    return LaunchScript(script.text_of(title, cluster, job, command, "tune.sh.j2"), job, gpus, 0)


def train(model: Model, cluster: Cluster, training: Training, options: Options, on_state: Callable[[Job], None]) -> Job:
    """Submit the training, or find its job that is not over, and wait until it is over.

    Raises:
        UnavailableError: Weights or libraries are missing. Others as `jobs.up` and `render`.
    """
    adapter, venv = training.output / "adapter", cluster.environment.venv
    active = [job for job in jobs.status(cluster) if training.name in job.submission.models and not job.over]
    if not active:
        if adapter.exists():
            raise UsageError(f"{adapter} is trained already.", hint="Choose another --name, or remove it.")
        if venv and not all([*venv.glob(f"lib/python3*/site-packages/{name}")] for name in ("trl", "peft")):
            fix = f"{venv}/bin/pip install 'trl>=1.16,<2' 'peft>=0.21,<1'"
            raise UnavailableError(f"{venv} lacks TRL or PEFT.", hint=fix)
        for problem in jobs.missing([model], cluster):
            raise problem
        kept = replace(training, data=training.output / "train.jsonl")  # a node may not see the user's file
        write_private(kept.data, training.data.read_text())
        named = model.model_copy(update={"key": training.name})
        submission = jobs.submit(render(model, cluster, kept, options), named, cluster)
        return jobs.wait_until_over(submission, cluster, on_state)
    return jobs.wait_until_over(active[0].submission, cluster, on_state)
