"""Breaks every deployment on purpose and shows which one answers instead.

Imports `client` and what is below it. Start at `drill.py`; `live.py` sends a real prompt to the real providers.
"""
