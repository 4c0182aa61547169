"""Diagnoses a failed task of an array: the same failure of other tasks and samples is asked about once.

    python examples/cached_diagnosis.py task_1.log tumor_7

Start it in every task: of those that fail alike at the same time, one sends its request and the others wait for it.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from biollm.client import BiollmError, get_model_client, normalize_log


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/cached_diagnosis.py LOG [NAME ...]")
    log, names = Path(sys.argv[1]), sys.argv[2:]
    client = get_model_client(sender="direct", tags={"agent": "ArrayDiagnosis"})
    try:
        answer = client.complete(
            "Why did this task fail, and what should be changed?",
            attachments=[log],
            cache="7d",
            cache_key=partial(normalize_log, names=names),
            deadline=120,
        )
    except BiollmError as error:
        sys.exit(str(error))
    for note in answer.notes:
        print(f"({note})")
    print(answer)
    print("stored answer" if answer.cached else "new answer", "of", answer.deployment)


if __name__ == "__main__":
    main()
