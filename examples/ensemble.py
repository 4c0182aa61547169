"""Asks three deployments what failed, and shows how far they agree.

    python examples/ensemble.py examples/nextflow_oom.log

With fewer than three deployments, some are asked twice.
"""

import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from biollm.client import BiollmError, get_model_client


class Diagnosis(BaseModel):
    category: Literal["memory", "disk", "time limit", "input data", "software", "configuration", "cluster", "other"]
    cause: str


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/ensemble.py LOG")
    try:
        answer = get_model_client().ensemble(
            "Diagnose why this run failed.",
            members=3,
            response_model=Diagnosis,
            attachments=[Path(sys.argv[1])],
            tags={"agent": "Ensemble"},
        )
    except BiollmError as error:
        sys.exit(str(error))
    print(f"{answer.parsed.category} ({answer.agreement:.0%} agree): {answer.parsed.cause}")
    for member in answer.members:
        print(f"  {member.name}: {getattr(member.answer, 'parsed', None) or member.answer}")


if __name__ == "__main__":
    main()
