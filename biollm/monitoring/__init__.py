"""What happened and what is happening: usage reports, alerts, metrics, the dashboard and page, `doctor`.

Imports `routing` and what is below it. Start at `usage.py` for the past, at `snapshot.py` for now.
"""
