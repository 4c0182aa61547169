"""Turns a sentence into a list of pipeline steps, checked: known tools only, each after what it reads from.

    python examples/workflow_composer.py "Find differentially expressed genes in paired-end RNA-seq"

A list that does not pass the checks goes back to the model once, with what is wrong with it; then the next is asked.
"""

import sys
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from biollm.client import BiollmError, get_model_client

Tool = Literal[
    "FASTQC", "TRIMGALORE", "STAR_ALIGN", "BWA_MEM", "SAMTOOLS_SORT", "MARKDUPLICATES",
    "HAPLOTYPECALLER", "SALMON_QUANT", "DESEQ2", "MULTIQC",
]  # fmt: skip


class Step(BaseModel):
    tool: Tool
    reads_from: list[Tool] = Field(
        description="Earlier steps whose output it reads; empty when it reads the FASTQ files."
    )
    why: str = Field(description="A few words.")


class Workflow(BaseModel):
    steps: list[Step] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> "Workflow":
        done: set[str] = set()
        for step in self.steps:
            if missing := set(step.reads_from) - done:
                raise ValueError(f"{step.tool} reads from {', '.join(sorted(missing))}, which no earlier step runs")
            done.add(step.tool)
        return self


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/workflow_composer.py SENTENCE")
    try:
        answer = get_model_client().complete(
            f"Compose a bioinformatics pipeline: {sys.argv[1]}",
            system="You compose nf-core pipelines out of the tools that the schema names.",
            response_model=Workflow,
            tags={"agent": "WorkflowComposer"},
        )
    except BiollmError as error:
        sys.exit(str(error))
    workflow: Workflow = answer.parsed
    for number, step in enumerate(workflow.steps, 1):
        source = ", ".join(step.reads_from) or "the FASTQ files"
        print(f"{number}. {step.tool:16} reads {source}: {step.why}")


if __name__ == "__main__":
    main()
