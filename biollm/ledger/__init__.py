"""What all processes of a user share: limits, cooldowns and the history of attempts.

Imports `config` and the foundation. Start at `store.py`; `quotas.py` counts limits, `history.py` sums up attempts.
"""

from biollm.ledger.records import Claim, Record, Refused
from biollm.ledger.store import Ledger

__all__ = ["Claim", "Ledger", "Record", "Refused"]
