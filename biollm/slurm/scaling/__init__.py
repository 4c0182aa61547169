"""Starts and stops replicas of local models with the demand. Start at `decision.py`; `controller.py` measures and acts."""
