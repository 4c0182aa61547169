"""The records of running model servers; see `biollm.slurm.endpoints`."""

from biollm.slurm.endpoints import Endpoint, Records, Watch

__all__ = ["Endpoint", "Records", "Watch"]
