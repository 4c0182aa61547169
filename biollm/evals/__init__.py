"""How good answers are, and what is learned from them.

Imports `client` and what is below it. Start at `comparison.py`, which asks several models the same questions, or at `tuning.py`,
which makes training data of rated answers.
"""

from biollm.evals.comparison import compare

__all__ = ["compare"]
