"""Explains every log of a folder, a few at a time, with a progress bar.

    python examples/many_logs.py examples/logs

A log that nobody could explain does not stop the others.
"""

import sys
from pathlib import Path

from rich.progress import Progress

from biollm.client import Completion, condense, get_model_client


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/many_logs.py FOLDER")
    logs = sorted(Path(sys.argv[1]).glob("*.log"))
    if not logs:
        sys.exit(f"{sys.argv[1]} has no *.log files")
    prompts = [f"Why did this job fail? One sentence.\n\n{condense(log)}" for log in logs]
    client = get_model_client(allow_degraded=True)
    with Progress() as bar:
        task = bar.add_task("asking", total=len(logs))
        answers = client.complete_many(
            prompts, concurrency=4, max_retries=2, progress=lambda done, _: bar.update(task, completed=done)
        )
    for log, answer in zip(logs, answers, strict=True):
        if isinstance(answer, Completion):
            mark = "[degraded, no diagnosis] " if answer.degraded else ""
            print(f"{log.name}: {mark}{answer.text.strip().splitlines()[0]}")
        else:
            print(f"{log.name}: no answer: {str(answer).splitlines()[0]}")
    if not all(isinstance(answer, Completion) for answer in answers):
        sys.exit(1)


if __name__ == "__main__":
    main()
