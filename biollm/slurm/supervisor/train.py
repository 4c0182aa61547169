"""Trains a LoRA adapter on a compute node with TRL and PEFT, under the site's environment and without biollm.

Neither library knows Slurm: on USR1 this saves a checkpoint and exits with 75, for which the job's script requeues the
job, and the next run resumes. The output folder gets checkpoints/, progress.jsonl (a line for each logged step) and, once
it is complete, adapter/.
"""
# pyright: basic, reportMissingImports=false

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

stop_requested = False


def _stop(*_):
    global stop_requested
    stop_requested = True


def options():
    """Read the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--submission", default="")
    for kind, names in ((str, "name"), (Path, "model data output"), (int, "rank length batch"), (float, "epochs learning-rate")):  # fmt: skip
        for name in names.split():
            parser.add_argument(f"--{name}", type=kind, required=True)
    return parser.parse_args()


def note(job, state, reason, **detail):
    """Append a line to the progress file and, for `biollm status`, to the events of the submission."""
    print(state, reason, flush=True)
    entry = {"at": time.time(), "model": job.name, "state": state, "reason": reason}
    line = json.dumps({**entry, "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0), **detail}) + "\n"
    events = [Path(__file__).parents[1] / "jobs" / f"{job.submission}.events"] if job.submission else []
    for file in [job.output / "progress.jsonl", *events]:
        with file.open("a") as opened:
            opened.write(line)


def train(job):
    """Train to the end, or until the signal; return the exit code."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if stop_requested:
                control.should_save = control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                step, loss = state.global_step, float(logs["loss"])
                text = f"step {step} of {state.max_steps}, loss {loss:.3g}"
                note(job, "training", text, step=step, steps=state.max_steps, loss=loss)

    chats = [json.loads(line)["messages"] for line in job.data.read_text().splitlines() if line.strip()]
    gpu, checkpoints = torch.cuda.is_available(), job.output / "checkpoints"
    at_once = 1 if gpu else job.batch  # a GPU's memory is computed for one
    config = SFTConfig(
        output_dir=str(checkpoints), num_train_epochs=job.epochs, learning_rate=job.learning_rate, max_length=job.length,
        per_device_train_batch_size=at_once, gradient_accumulation_steps=job.batch // at_once,
        gradient_checkpointing=gpu, bf16=True, use_cpu=not gpu, logging_steps=0.01, save_steps=0.1, save_total_limit=2,
        report_to="none", disable_tqdm=True, seed=0,
        model_init_kwargs={"dtype": "bfloat16", **({"device_map": "auto"} if gpu else {})},
    )  # fmt: skip
    trainer = SFTTrainer(
        str(job.model), args=config, callbacks=[Callback()],
        train_dataset=Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]),
        peft_config=LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    whole = [file.parent for file in checkpoints.glob("checkpoint-*/trainer_state.json")]  # which is written last
    newest = max(whole, key=lambda folder: int(folder.name[11:]), default=None)
    note(
        job,
        "training",
        f"resuming from {newest.name}"
        if newest
        else f"starting with {len(chats)} example{'' if len(chats) == 1 else 's'}",
    )
    trainer.train(resume_from_checkpoint=newest and str(newest))
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps:
        down = (Path(__file__).parents[1] / "jobs" / f"{job.submission}.stop").exists()
        note(
            job, "stopped" if down else "draining", f"saved at step {step} of {steps}, {'down' if down else 'walltime'}"
        )
        return 0 if down else 75
    trainer.save_model(str(job.output / "adapter.new"))
    (job.output / "adapter.new").rename(job.output / "adapter")
    note(job, "stopped", f"trained {steps} steps: {job.output / 'adapter'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _stop)
    os.umask(0o077)
    job = options()
    job.output.mkdir(parents=True, exist_ok=True)
    try:
        sys.exit(train(job))
    except Exception as error:
        note(job, "failed", f"{type(error).__name__}: {error}")
        raise
