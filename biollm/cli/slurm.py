"""Commands for models on the cluster: render-slurm, fit, pull, up, status, logs, down, doctor, models add."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from biollm import config, slurm
from biollm.cli import output
from biollm.cli.output import Json, Progress
from biollm.errors import SlurmError, UnavailableError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from biollm.config import Cluster, Config, Model
    from biollm.slurm import Job, Options
    from biollm.slurm.memory import FitReport

Models = Annotated[list[str], Argument(metavar="MODEL", help="One or more models.")]
Target = Argument(metavar="TARGET", help="A model or a job id.")
Set = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override a model's setting: vllm_args.max_model_len=16384."),
]
Partition = Annotated[str | None, Option(metavar="NAME", help="Slurm partition.")]
Account = Annotated[str | None, Option(metavar="NAME", help="Slurm account.")]
Qos = Annotated[str | None, Option(metavar="NAME", help="Slurm quality of service.")]
Time = Annotated[str | None, Option("--time", metavar="H:MM:SS", help="Walltime.")]
Gpus = Annotated[int | None, Option(min=0, metavar="N", help="Number of GPUs.")]


def render_slurm(
    models: Models,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    time: Time = None,
    gpus: Gpus = None,
    change: Set = None,
    force: Annotated[bool, Option("--force", help="Render even if it does not fit.")] = False,
    plain: Annotated[bool, Option("--plain", help="Just `vllm serve`, without biollm's supervisor.")] = False,
    port: Annotated[int, Option(min=1, max=65535, metavar="PORT", help="Port for --plain.")] = 8000,
    file: Annotated[Path | None, Option("-o", "--output", metavar="FILE", help="Write to a file.")] = None,
) -> None:
    """Print the launch script of a model server, ready for sbatch.

    Several models share one job. Nothing is submitted.
    """
    from biollm._files import write_for_user
    from biollm.slurm import script

    settings = config.load_config()
    cluster, chosen = settings.cluster, local_models(settings, models, change)
    options = slurm_options(time, partition=partition, account=account, qos=qos, gpus=gpus, force=force)
    if plain and len(chosen) > 1:
        raise UsageError("--plain serves one model.", hint="Render one script for each model.")
    if plain:
        key_file = slurm.plain_key_file(cluster)
        rendered = script.render_plain(chosen[0], cluster, options, key_file=key_file, port=port)
    else:
        rendered = script.render(chosen, cluster, options)
    warn([*rendered.warnings, *prepared(cluster, plain=plain)])
    if file:
        write_for_user(file, rendered.text)
    else:
        print(rendered.text, end="")


def prepared(cluster: Cluster, *, plain: bool = False) -> Iterator[str]:
    """Write what a rendered script reads; yield a warning where that is impossible."""
    try:
        slurm.prepare(cluster, plain=plain)
    except (SlurmError, OSError) as error:
        yield f"{error} Repeat this command on a login node before sbatch: it writes what the job reads."


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on stderr."""
    print(*(f"warning: {warning}\n" for warning in warnings), sep="", end="", file=sys.stderr)


def slurm_options(time: str | None, **others: Any) -> Options:
    """Return options of a job, with the walltime as people write it."""
    from biollm.config.values import walltime

    try:
        return slurm.Options(walltime=walltime(time) if time else None, **others)
    except ValueError as error:
        raise UsageError(f"--time: {error}") from None


def local_models(settings: Config, names: list[str], changes: list[str] | None = None) -> list[Model]:
    """Return the local models of these names, each with all of `--set` applied."""
    from biollm.slurm.script import override

    local = {key: model for key, model in settings.models.items() if model.type == "local"}
    chosen: list[Model] = []
    for name in names:
        if name not in local:
            raise UnknownNameError("local model", name, local)
        model = local[local[name].base or name]
        for change in changes or []:
            model = override(model, change)
        chosen.append(model)
    return list({model.key: model for model in chosen}.values())  # an adapter and its base have one server


def fit(
    model: Annotated[str | None, Argument(metavar="MODEL", help="Default: all local models.")] = None,
    config_json: Annotated[
        Path | None, Option("--config", metavar="FILE", help="config.json of a model not in models.yaml.")
    ] = None,
    gpus: Gpus = None,
    gpu: Annotated[str | None, Option(metavar="GPU", help="Another GPU: h100, a100-40gb, or its GiB.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, Option(min=0.01, max=1, metavar="SHARE", help="Share of a GPU's memory for vLLM.")
    ] = None,
    quantization: Annotated[
        str | None, Option(metavar="KIND", help="Quantization of the weights: fp8, int8, awq, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether models fit their GPUs.

    Shows the context that fits, and what would make a model fit. Exits 78 if one does not.
    """
    from biollm.slurm import memory
    from biollm.slurm.add_model import unregistered

    settings = config.load_config()
    known = [key for key, each in settings.models.items() if each.type == "local" and each.architecture]
    chosen = [unregistered(config_json)] if config_json else local_models(settings, [model] if model else known)
    options: dict[str, Any] = {"gpus": gpus, "gpu": gpu, "quantization": quantization}
    options["gpu_memory_utilization"] = gpu_memory_utilization
    reports = {each.key: memory.fit(each, settings.cluster, **options) for each in chosen}
    if as_json:
        output.as_json(reports)
    else:
        _print_reports(reports)
    if not all(report.fits for report in reports.values()):
        raise typer.Exit(78)


def _print_reports(reports: dict[str, FitReport]) -> None:
    head = ("model", "fits", "GPUs", "weights/GPU", "KV cache", "context", "tokens", "sequences")
    weights = {key: f"{r.weights_per_gpu_gib:.1f} of {r.budget_gib:.1f} GiB" for key, r in reports.items()}
    rows = [
        (key, "yes" if r.fits else "no", r.gpus, weights[key], f"{r.kv_gib:.1f} GiB", r.max_model_len, r.tokens,
         f"{r.sequences:.1f}")
        for key, r in reports.items()
    ]  # fmt: skip
    output.table(head, rows)
    for key, report in reports.items():
        for line in (*report.reasons, *(f"would help: {each}" for each in report.suggestions)):
            print(f"{key}: {line}")


def pull(models: Models) -> None:
    """Download the weights of models.

    Resumes an interrupted download; checks for free space first.
    """
    from biollm.slurm import weights

    settings, progress = config.load_config(), Progress()
    for model in local_models(settings, models):
        path = weights.pull(model, settings.cluster, progress.bytes)
        progress.clear()
        progress.note(f"{model.key}: ready")
        print(path)


def up(
    models: Models,
    replicas: Annotated[int, Option(min=1, metavar="N", help="Number of replicas.")] = 1,
    together: Annotated[bool, Option("--together", help="Serve several models in one job.")] = False,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    time: Time = None,
    gpus: Gpus = None,
    change: Set = None,
    share: Annotated[str, Option(metavar="GROUP", help="Unix group that may use the servers, too.")] = "",
    handover: Annotated[
        bool | None, Option("--handover/--no-handover", help="Start a successor before the walltime ends.")
    ] = None,
    no_wait: Annotated[bool, Option("--no-wait", help="Return once submitted.")] = False,
    timeout: Annotated[float | None, Option(metavar="SECONDS", help="Stop waiting; the job stays.")] = None,
    yes: Annotated[bool, Option("--yes", help="Submit even if GPUs of a whole node would be idle.")] = False,
    force: Annotated[bool, Option("--force", help="Submit even if it does not fit.")] = False,
    as_json: Json = False,
) -> None:
    """Start model servers and wait until they answer."""
    settings, progress = config.load_config(), Progress(quiet=as_json)
    options = slurm_options(
        time, partition=partition, account=account, qos=qos, gpus=gpus, force=force, handover=handover
    )
    chosen = local_models(settings, models, change)
    jobs: list[Job] = []
    for part in [chosen] if together else [[model] for model in chosen]:
        jobs += slurm.up(
            part, settings.cluster, options, replicas=replicas, share=share, whole_nodes=yes, wait=not no_wait,
            timeout=timeout, on_state=lambda job: progress.say(state_line(job)),
        )  # fmt: skip
    progress.clear()
    _show(jobs, as_json=as_json)


def state_line(job: Job) -> str:
    """Return the state of a job in one line."""
    names, where = " ".join(job.submission.models), " ".join(endpoint.base_url for endpoint in job.endpoints)
    start = f", estimated start {job.start}" if job.phase == "pending" and job.start not in ("", "N/A") else ""
    return f"{names}: job {job.submission.job} {job.phase} {where or job.reason}{start}".rstrip()


def _show(jobs: list[Job], *, as_json: bool) -> None:
    facts: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    for job in jobs:
        submission, requests = job.submission, [each for each in job.requests.values() if each]
        servers = [
            {"model": e.model, "url": e.base_url, "start": e.start, "requests": job.requests.get(e.start)}
            for e in job.endpoints
        ]
        state = {name: getattr(job, name) for name in ("phase", "reason", "start", "node", "left_s")}
        names = {"job": submission.job, "models": submission.models, "gpus": submission.gpus}
        facts.append(names | state | {"servers": servers})
        load = f"{sum(running for running, _ in requests)}+{sum(waiting for _, waiting in requests)}"
        where = " ".join(endpoint.base_url for endpoint in job.endpoints) or job.reason or "-"
        rows.append(
            (submission.job, " ".join(submission.models), job.phase, job.node or "-", _clock(job.left_s),
             load if requests else "-", where)
        )  # fmt: skip
    if as_json:
        output.as_json(facts)
    else:
        output.table(("job", "models", "phase", "node", "left", "running+waiting", "where or why"), rows)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, left = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


def status(as_json: Json = False) -> None:
    """Show jobs, servers, walltime left and requests."""
    from biollm.slurm import scaling

    settings = config.load_config()
    jobs = slurm.status(settings.cluster)
    if jobs or as_json:
        _show(jobs, as_json=as_json)
    else:
        print("No model server was started in the last day. Start one with `biollm up MODEL`.")
    for key, state in () if as_json else scaling.scaled(settings).items():
        print(f"{key}: {state.line}")


def autoscale(as_json: Json = False) -> None:
    """Start and stop servers by demand (`scale`).

    For cron: one look, then exit. A running gateway does the same.
    """
    from biollm._runtime import ledger
    from biollm.config.paths import biollm_dir
    from biollm.monitoring.usage import ending_budgets
    from biollm.slurm import commands, scaling

    settings = config.load_config()
    if not scaling.scaled(settings):
        raise UsageError("No model has `scale`.", hint="Add `scale: {min: 0, max: 2}` to a local model in models.yaml.")
    with scaling.controlling(settings.cluster) as alone:
        decisions = (
            scaling.look(settings, ledger(settings), ending_budgets(settings, ledger(settings))) if alone else {}
        )
    if error := commands.queue(biollm_dir(settings.cluster), settings.cluster.name).error:
        raise SlurmError(error, hint="Nothing was decided. Run this on a login node of the cluster.")
    if not alone:
        print("Another controller runs: the gateway, or another `biollm autoscale`. It decides.", file=sys.stderr)
    if as_json:
        output.as_json([{"model": key, **decision._asdict()} for key, decision in decisions.items()])
        return
    for key, decision in decisions.items():
        print(f"{key}: {decision.line}")


def logs(
    target: Annotated[str, Target],
    follow: Annotated[bool, Option("-f", "--follow", help="Follow the log until the job ends.")] = False,
    lines: Annotated[int, Option("-n", "--lines", min=0, metavar="N", help="Number of lines.")] = 50,
) -> None:
    """Print the last lines of a server's log."""
    for line in slurm.logs(config.load_config().cluster, target, lines=lines, follow=follow):
        print(line, flush=follow)


def down(
    target: Annotated[str | None, Target] = None,
    every: Annotated[bool, Option("--all", help="All your jobs that biollm started.")] = False,
    no_wait: Annotated[bool, Option("--no-wait", help="Do not wait.")] = False,
    as_json: Json = False,
) -> None:
    """Stop servers after they finish the requests in flight."""
    if (target is None) == (not every):
        raise UsageError("Name a model or a job, or use --all.")
    stopped = slurm.down(config.load_config().cluster, target, wait=not no_wait)
    if as_json:
        output.as_json([{"job": submission.job, "models": submission.models} for submission in stopped])
        return
    for submission in stopped:
        print(f"stopped job {submission.job} ({' '.join(submission.models)})")
    if not stopped:
        print("Nothing was running.")


def doctor(as_json: Json = False) -> None:
    """Check the setup and suggest fixes.

    Exits 1 if a check fails.
    """
    from biollm.monitoring.doctor import check

    checks = check(config.load_config())
    if as_json:
        output.as_json([{**vars(each), "mend": each.fix} for each in checks])  # `mend`: its name until 0.2
    else:
        for each in checks:
            output.paragraph(f"{'ok  ' if each.ok else 'FAIL'}  {each.name}: {each.detail}", indent=6)
            if not each.ok:
                output.paragraph(f"      {each.fix}", indent=6)
    if not all(each.ok for each in checks):
        raise typer.Exit(1)


def models_add(
    hf_id: Annotated[str, Argument(metavar="HF_ID", help="Hugging Face id: Qwen/Qwen2.5-Coder-32B-Instruct.")],
    config_json: Annotated[
        Path | None, Option("--config", metavar="FILE", help="Its config.json (default: downloaded).")
    ] = None,
    name: Annotated[str | None, Option(metavar="NAME", help="Key in models.yaml.")] = None,
) -> None:
    """Add a model, with its architecture, to models.yaml."""
    from biollm.config.paths import config_dirs
    from biollm.slurm import add_model

    folder, cluster = config_dirs()[-1][1], config.load_config().cluster
    try:
        key, file = add_model.add(hf_id, folder, cluster, config=config_json, name=name)
    except UnavailableError as error:
        hint = "Where Hugging Face cannot be reached, name the model's config.json: --config FILE."
        raise UnavailableError(str(error), hint=hint) from None
    print(f"{key}: added to {file}. Next: `biollm fit {key}`, `biollm pull {key}`, `biollm up {key}`.")
