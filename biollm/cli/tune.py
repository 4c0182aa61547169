"""The commands of `biollm tune`: from rated answers to a LoRA adapter in models.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from biollm import config
from biollm.cli import output
from biollm.cli.output import Json, Progress
from biollm.cli.slurm import Gpus, Time, local_models, prepared, slurm_options, state_line, warn
from biollm.errors import UsageError
from biollm.types import counted

if TYPE_CHECKING:
    from biollm.config import Cluster, Model
    from biollm.slurm import Options
    from biollm.slurm.training import Training

Base = Annotated[str, Argument(metavar="MODEL", help="The local model to adapt.")]
Data = Annotated[Path, Argument(metavar="FILE", exists=True, dir_okay=False, help="Chat JSONL to train on.")]
Name = Annotated[str, Option(metavar="NAME", help="Name of the adapter (default: MODEL-tuned).")]
Rank = Annotated[int, Option(min=1, max=512, metavar="N", help="Rank of the adapter.")]
Length = Annotated[int, Option(min=1, metavar="TOKENS", help="Longest sequence; longer ones are cut.")]
Epochs = Annotated[float, Option(min=0.01, metavar="N", help="Passes over the data.")]
Rate = Annotated[float, Option(min=0, metavar="RATE", help="Learning rate.")]

app = typer.Typer(name="tune", no_args_is_help=True, help="Fine-tune a local model on rated answers.")


@app.command()
def export(
    file: Annotated[Path, Option("-o", "--output", metavar="FILE", help="Write the training data here.")],
    source: Annotated[
        Path | None, Option("--from", metavar="FILE", exists=True, help="Chat JSONL, instead of your rated answers.")
    ] = None,
    name: Annotated[
        list[str] | None, Option(metavar="NAME", callback=output.filled, help="Replace this name, too; repeatable.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Write rated answers as training data.

    Keys, users, folders and repeats are removed. A fifth of the runs goes to a second file, FILE.held-out.jsonl, for `biollm compare`.
    """
    from biollm.config.paths import state_dir
    from biollm.evals import tuning
    from biollm.ledger.ratings import Ratings
    from biollm.providers import credentials

    file, beside = tuning.places(file, source, force=force)
    accounts = [(each, account) for each in config.load_config().providers for account in each.accounts]
    keys = [credentials.find(*each, state_dir(), exchange=False) for each in accounts]
    secrets = [key.secret for key in keys if not isinstance(key, str)]
    examples = tuning.read(source) if source else tuning.of_ratings(Ratings(state_dir()).rated())
    train, held_out = tuning.split(tuning.prepared(examples, name or [], secrets))
    if not train:
        message = f"Found {counted(len(held_out), 'different example')}, of fewer than two runs."
        raise UsageError(message, hint="Rate more answers (`biollm rate`), or give a file: --from FILE.")
    tuning.write(train, held_out, file, beside)
    print(f"{file}: {counted(len(train), 'example')}\n{beside}: {counted(len(held_out), 'example')}, held out")


@app.command()
def fit(model: Base, rank: Rank = 16, length: Length = 2048, gpus: Gpus = None, as_json: Json = False) -> None:
    """Show the GPU memory that training needs.

    Exits 78 if it does not fit.
    """
    from biollm.slurm import training

    settings = config.load_config()
    (chosen,) = local_models(settings, [model])
    count, parts = training.memory(chosen, settings.cluster, rank, length, gpus)
    if as_json:
        output.as_json({"gpus": count, "gib": parts, "gpu_gib": settings.cluster.gpu_memory_gib})
        return
    rows = (parts | {"total": sum(parts.values())}).items()
    output.table(("GiB per GPU", ""), [(part, f"{gib:.1f}") for part, gib in rows])
    print(f"Fits {count} x {settings.cluster.gpu_memory_gib:g} GiB. Assumed:", *training.ASSUMPTIONS, sep="\n  ")


def _plan(
    base: str, data: Path, name: str, time: str | None, gpus: int | None, *how: Any
) -> tuple[Model, Cluster, Training, Options]:
    from biollm.config.paths import models_dir
    from biollm.evals import tuning
    from biollm.slurm.training import Training

    if not [*tuning.read(data)]:  # before a GPU waits
        raise UsageError(f"{data} has no examples.", hint="`biollm tune export` writes some.")
    settings, name = config.load_config(), name or f"{base}-tuned"
    (model,) = local_models(settings, [base])
    known = settings.models.get(name)
    if (
        not re.fullmatch(r"[A-Za-z0-9][\w./@+-]*", name)
        or ".." in Path(name).parts
        or (known and known.base != model.key)
    ):
        raise UsageError(f"{name!r} cannot be the name of an adapter of {base}.", hint="Choose another --name.")
    training = Training(name, data.resolve(), models_dir(settings.cluster) / "adapters" / name, *how)
    if not training.learning_rate:
        raise UsageError("--learning-rate is 0; it must be above 0.")
    return model, settings.cluster, training, slurm_options(time, gpus=gpus)


@app.command()
def render(
    model: Base, file: Data, name: Name = "", rank: Rank = 16, length: Length = 2048, epochs: Epochs = 3,
    learning_rate: Rate = 2e-4, time: Time = None, gpus: Gpus = None,
) -> None:  # fmt: skip
    """Print the Slurm script that trains an adapter. Nothing is submitted."""
    from biollm.slurm import training

    planned = _plan(model, file, name, time, gpus, rank, length, epochs, learning_rate)
    text = training.render(*planned).text
    warn(prepared(planned[1]))
    print(text, end="")


@app.command()
def up(
    model: Base, file: Data, name: Name = "", rank: Rank = 16, length: Length = 2048, epochs: Epochs = 3,
    learning_rate: Rate = 2e-4, time: Time = None, gpus: Gpus = None,
) -> None:  # fmt: skip
    """Train an adapter, and show its steps and loss.

    Ctrl-C leaves the job running; the same command shows it again. `biollm down NAME` stops it.
    """
    from biollm.slurm import training

    progress = Progress()
    job = training.train(
        *_plan(model, file, name, time, gpus, rank, length, epochs, learning_rate),
        lambda job: progress.say(state_line(job)),
    )
    progress.clear()
    print(job.reason)


@app.command()
def entry(model: Base, name: Name = "") -> None:
    """Print the entry of models.yaml for a trained adapter."""
    from biollm.config.paths import models_dir
    from biollm.evals import tuning

    settings, name = config.load_config(), name or f"{model}-tuned"
    (base,) = local_models(settings, [model])
    adapter = models_dir(settings.cluster) / "adapters" / name / "adapter"
    print(tuning.entry(name, base, settings.cluster, adapter), end="")
