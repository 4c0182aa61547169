"""What a process makes once and everything in it uses: its ledger, and its view of the running servers."""

from __future__ import annotations

from biollm._background import background
from biollm.config import Cluster
from biollm.config.paths import state_dir
from biollm.config.site import run_dir
from biollm.ledger import Ledger
from biollm.slurm.endpoints import Watch


def ledger() -> Ledger:
    """Return the process's ledger of the state folder."""
    here, key = background(), ("ledger", state_dir())
    if key not in here.kept:
        here.kept[key] = Ledger(state_dir())
        here.stop_first()  # what is cancelled at exit is then still written
    return here.kept[key]


def watch(cluster: Cluster) -> Watch:
    """Return the process's view of the servers that run at the site."""
    kept, key = background().kept, ("watch", run_dir(cluster), cluster.trusted_owners)
    if key not in kept:
        kept[key] = Watch(cluster)
    return kept[key]
