"""Commands for models on the cluster: render-slurm, fit, pull, up, status, logs, down, doctor, models add."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biollm.cli import output
from biollm.cli.output import Json, Progress
from biollm.errors import SlurmError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from biollm.config import Config, Model
    from biollm.slurm.memory import FitReport
    from biollm.slurm.script import Options
    from biollm.slurm.submissions import Job

Models = Annotated[list[str], typer.Argument(metavar="MODEL", help="One or several models.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a model's entry, as vllm_args.max_model_len=16384; repeatable."
    ),
]
Partition = Annotated[str | None, typer.Option(metavar="NAME", help="Slurm's partition.")]
Account = Annotated[str | None, typer.Option(metavar="NAME", help="Slurm's account.")]
Qos = Annotated[str | None, typer.Option(metavar="NAME", help="Slurm's quality of service.")]
Time = Annotated[str | None, typer.Option("--time", metavar="H:MM:SS", help="Walltime.")]
Gpus = Annotated[int | None, typer.Option(min=0, metavar="N", help="GPUs of the one model.")]
Force = Annotated[bool, typer.Option("--force", help="Even what does not fit.")]


def render_slurm(
    models: Models,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    time: Time = None,
    gpus: Gpus = None,
    change: Set = None,
    force: Force = False,
    plain: Annotated[bool, typer.Option("--plain", help="Just `vllm serve`, without biollm's supervisor.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT", help="Port for --plain.")] = 8000,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the script to a file.")
    ] = None,
) -> None:
    """Print the launch script of a model server, ready for sbatch.

    Several models share one job. Nothing is submitted.
    """
    from biollm import slurm
    from biollm._files import write_for_user
    from biollm.config import load_config
    from biollm.slurm.script import render, render_plain

    config = load_config()
    options = _options(partition=partition, account=account, qos=qos, time=time, gpus=gpus, force=force)
    chosen = _chosen(config, models, change)
    if plain:
        if len(chosen) > 1:
            raise UsageError("--plain serves one model.", hint="Render one script for each model.")
        key_file = slurm.plain_key_file(config.cluster)
        script = render_plain(chosen[0], config.cluster, options, key_file=key_file, port=port)
    else:
        script = render(chosen, config.cluster, options)
    warnings = [*script.warnings]
    try:
        slurm.prepare(config.cluster, plain=plain)
    except (SlurmError, OSError) as error:
        warnings.append(f"{error} Repeat this command on a login node before sbatch: it writes what the job reads.")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if output:
        write_for_user(output, script.text)
    else:
        print(script.text, end="")


def _options(*, time: str | None, **rest: Any) -> Options:
    from biollm.config.values import walltime
    from biollm.slurm.script import Options

    try:
        return Options(walltime=walltime(time) if time else None, **rest)
    except ValueError as error:
        raise UsageError(f"--time: {error}") from None


def _chosen(config: Config, names: list[str], changes: list[str] | None = None) -> list[Model]:
    """Return the local models of these names, with `--set` applied to each."""
    from biollm.slurm.script import override

    local = {key: model for key, model in config.models.items() if model.type == "local"}
    chosen: list[Model] = []
    for name in names:
        if name not in local:
            raise UnknownNameError("local model", name, local)
        model = local[name]
        for change in changes or []:
            model = override(model, change)
        chosen.append(model)
    return chosen


def fit(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="By default every local one.")] = None,
    config_json: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The config.json of a model that is not in models.yaml."),
    ] = None,
    gpus: Gpus = None,
    gpu: Annotated[str | None, typer.Option(metavar="GPU", help="Another GPU: h100, a100-40, or its GiB.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0.01, max=1, metavar="SHARE", help="Of a GPU's memory, that vLLM takes.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(metavar="KIND", help="Of the weights: fp8, int8, awq, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether a model fits its GPUs.

    With how many tokens, and what would make it fit. Exit 78 when one does not.
    """
    from biollm.config import load_config
    from biollm.slurm.add_model import unregistered
    from biollm.slurm.memory import fit as compute

    config = load_config()
    local = [key for key, each in config.models.items() if each.type == "local" and each.architecture]
    chosen = [unregistered(config_json)] if config_json else _chosen(config, [model] if model else local)
    options: dict[str, Any] = {
        "gpus": gpus,
        "gpu": gpu,
        "gpu_memory_utilization": gpu_memory_utilization,
        "quantization": quantization,
    }
    reports = {each.key: compute(each, config.cluster, **options) for each in chosen}
    if as_json:
        output.as_json(reports)
    else:
        output.table(
            ("model", "fits", "GPUs", "weights/GPU", "KV cache", "context", "tokens", "sequences"), _rows(reports)
        )
        for key, report in reports.items():
            for line in (*report.reasons, *(f"would help: {each}" for each in report.suggestions)):
                print(f"{key}: {line}")
    if not all(report.fits for report in reports.values()):
        raise typer.Exit(78)


def _rows(reports: dict[str, FitReport]) -> list[tuple[object, ...]]:
    return [
        (
            key,
            "yes" if report.fits else "no",
            report.gpus,
            f"{report.weights_per_gpu_gib:.1f} of {report.budget_gib:.1f} GiB",
            f"{report.kv_gib:.1f} GiB",
            report.max_model_len,
            report.tokens,
            f"{report.sequences:.1f}",
        )
        for key, report in reports.items()
    ]


def pull(models: Models) -> None:
    """Get models' weights before a GPU waits for them.

    Goes on where it was interrupted; looks for free space first.
    """
    from biollm.config import load_config
    from biollm.slurm import weights

    config, progress = load_config(), Progress()
    for model in _chosen(config, models):
        path = weights.pull(model, config.cluster, progress.bytes)
        progress.note(f"{model.key}: ready")
        print(path)


def up(
    models: Models,
    replicas: Annotated[int, typer.Option(min=1, metavar="N", help="How many such jobs.")] = 1,
    together: Annotated[bool, typer.Option("--together", help="Several models share one job.")] = False,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    time: Time = None,
    gpus: Gpus = None,
    change: Set = None,
    share: Annotated[str, typer.Option(metavar="GROUP", help="A Unix group that may use the servers, too.")] = "",
    handover: Annotated[
        bool | None, typer.Option("--handover/--no-handover", help="A successor before the walltime ends.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once submitted.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Wait no longer; the job stays.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Even where GPUs of a whole node would idle.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Start model servers and wait until they answer."""
    from biollm import slurm
    from biollm.config import load_config

    config, progress = load_config(), output.Progress(quiet=as_json)
    options = _options(
        time=time, partition=partition, account=account, qos=qos, gpus=gpus, force=force, handover=handover
    )
    chosen = _chosen(config, models, change)
    jobs: list[Job] = []
    for part in [chosen] if together else [[model] for model in chosen]:
        jobs += slurm.up(
            part,
            config.cluster,
            options,
            replicas=replicas,
            share=share,
            whole_nodes=yes,
            wait=not no_wait,
            timeout=timeout,
            on_state=lambda job: progress.say(state_line(job)),
        )
    progress.clear()
    _show(jobs, as_json=as_json)


def state_line(job: Job) -> str:
    """Return one line that says how a job is."""
    names = " ".join(job.submission.models)
    start = f", Slurm expects it at {job.start}" if job.phase == "pending" and job.start not in ("", "N/A") else ""
    where = " ".join(endpoint.base_url for endpoint in job.endpoints)
    return f"{names}: job {job.submission.job} {job.phase} {where or job.reason}{start}".rstrip()


def _show(jobs: list[Job], *, as_json: bool) -> None:
    if as_json:
        output.as_json([_fact(job) for job in jobs])
        return
    rows = [
        (
            job.submission.job,
            " ".join(job.submission.models),
            job.phase,
            job.node or "-",
            _span(job.left_s),
            _requests(job),
            " ".join(endpoint.base_url for endpoint in job.endpoints) or job.reason or "-",
        )
        for job in jobs
    ]
    output.table(("job", "models", "phase", "node", "left", "running+waiting", "where or why"), rows)


def _fact(job: Job) -> dict[str, Any]:
    submission = job.submission
    servers = [
        {"model": e.model, "url": e.base_url, "start": e.start, "requests": job.requests.get(e.start)}
        for e in job.endpoints
    ]
    facts = {name: getattr(job, name) for name in ("phase", "reason", "start", "node", "left_s")}
    return {"job": submission.job, "models": submission.models, "gpus": submission.gpus, **facts, "servers": servers}


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _requests(job: Job) -> str:
    known = [each for each in job.requests.values() if each]
    return f"{sum(each[0] for each in known)}+{sum(each[1] for each in known)}" if known else "-"


def status(as_json: Json = False) -> None:
    """Show jobs, servers, walltime left and requests."""
    from biollm import slurm
    from biollm.config import load_config

    jobs = slurm.status(load_config().cluster)
    if not jobs and not as_json:
        print("No model server has been started in the last day. `biollm up MODEL` starts one.")
        return
    _show(jobs, as_json=as_json)


def logs(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A model, or a job's number.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, metavar="N", help="How many.")] = 50,
) -> None:
    """Print the last lines of a server's log."""
    from biollm import slurm
    from biollm.config import load_config

    for line in slurm.logs(load_config().cluster, target, lines=lines, follow=follow):
        print(line, flush=follow)


def down(
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="A model, or a job's number.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every job of yours that biollm started.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return at once.")] = False,
    as_json: Json = False,
) -> None:
    """Stop servers, once they have finished what runs."""
    from biollm import slurm
    from biollm.config import load_config

    if (target is None) == (not every):
        raise UsageError("Name a model or a job, or say --all.")
    stopped = slurm.down(load_config().cluster, target, wait=not no_wait)
    if as_json:
        output.as_json([{"job": submission.job, "models": submission.models} for submission in stopped])
        return
    for submission in stopped:
        print(f"stopped job {submission.job} ({' '.join(submission.models)})")
    if not stopped:
        print("Nothing was running.")


def doctor(as_json: Json = False) -> None:
    """Check what a newcomer trips over, with the mend.

    Exit 1 when something is wrong.
    """
    from biollm.config import load_config
    from biollm.monitoring import doctor as checks

    found = checks.check(load_config())
    if as_json:
        output.as_json(found)
    for each in [] if as_json else found:
        print(
            f"{'ok  ' if each.ok else 'FAIL'}  {each.name}: {each.detail}"
            + (f"\n      {each.mend}" if not each.ok else "")
        )
    if not all(each.ok for each in found):
        raise typer.Exit(1)


def models_add(
    hf_id: Annotated[
        str, typer.Argument(metavar="HF_ID", help="Its name at Hugging Face: Qwen/Qwen2.5-Coder-32B-Instruct.")
    ],
    config_json: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Its config.json; else it is fetched.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Its name here.")] = None,
) -> None:
    """Add a model, with its architecture, to models.yaml."""
    from biollm.config import load_config
    from biollm.config.paths import config_dirs
    from biollm.slurm import add_model

    folder, cluster = config_dirs()[-1][1], load_config().cluster
    key, file = add_model.add(hf_id, folder, cluster, config=config_json, name=name)
    print(
        f"{key}: added to {file}. `biollm fit {key}` says what it needs, `biollm pull {key}` and `biollm up {key}` start it."
    )
