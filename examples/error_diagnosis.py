"""Reads the log of a failed Nextflow run and prints a typed diagnosis.

    python examples/error_diagnosis.py examples/nextflow_oom.log

The small embedded model is not asked: it would fill in the form, with nonsense.
"""

import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from biollm.client import BiollmError, get_model_client


class Diagnosis(BaseModel):
    category: Literal["memory", "disk", "time limit", "input data", "software", "configuration", "cluster", "other"]
    cause: str = Field(description="What went wrong, in one sentence.")
    fix: str = Field(description="What to change, as a line of configuration or a command.")
    confidence: float = Field(ge=0, le=1)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/error_diagnosis.py LOG")
    try:
        answer = get_model_client().complete(
            "Diagnose why this Nextflow run failed.",
            attachments=[Path(sys.argv[1])],
            response_model=Diagnosis,
            tags={"agent": "ErrorDiagnosis"},
        )
    except BiollmError as error:
        sys.exit(str(error))  # names each provider and why it could not answer
    found = answer.parsed
    print(f"category    {found.category}\ncause       {found.cause}\nfix         {found.fix}")
    print(f"confidence  {found.confidence:.0%}, says {answer.deployment}")


if __name__ == "__main__":
    main()
