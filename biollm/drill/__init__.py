"""Tests the failover before it is needed.

Imports `client` and what is below it. Start at `drill.py`: it breaks every deployment on purpose and reports which one
answers instead; `live.py` sends one short prompt to each real provider.
"""
