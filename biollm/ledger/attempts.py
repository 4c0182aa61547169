"""The table `attempt` of history.db: one row per finished attempt, one column per field of Record, indexed by `at`."""

# ruff: noqa: S608 # what is put into SQL are names of columns; values are parameters
from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from biollm.ledger.records import Record

NAMES = [field.name for field in fields(Record)]
COLUMNS = ", ".join(f'"{name}"' for name in NAMES)
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS attempt (id INTEGER PRIMARY KEY, {COLUMNS});
CREATE INDEX IF NOT EXISTS attempt_at ON attempt (at);
"""
ADD = f"INSERT INTO attempt ({COLUMNS}) VALUES ({', '.join('?' * len(NAMES))})"
PAGE = f"SELECT id, {COLUMNS} FROM attempt WHERE (at, id) > (?, ?) AND at < ? ORDER BY at, id LIMIT 5000"
LAST_ANSWERS = "SELECT deployment, completion_tokens FROM attempt WHERE outcome = 'ok' ORDER BY at DESC LIMIT 1000"
SUMS = (  # of a period and a scope: requests, tokens, USD
    "SELECT count(*), total(prompt_tokens + completion_tokens), total(cost_usd) FROM attempt WHERE at >= ? AND at < ?"
    " AND outcome NOT IN ('skipped', 'cached') AND ? IN (provider || '/' || account, provider || '/' || account || ':' || model)"
)
UNSERVED = "SELECT model, at FROM attempt WHERE at >= ? AND outcome = 'skipped' ORDER BY at"
SUMS_OF_KEY = (  # of a period and a gateway's key, whose name is a tag; a stored answer used nothing
    "SELECT count(DISTINCT request), total(CASE outcome WHEN 'cached' THEN 0 ELSE prompt_tokens + completion_tokens END),"
    " total(CASE outcome WHEN 'cached' THEN 0 ELSE cost_usd END) FROM attempt WHERE at >= ? AND at < ? AND instr(tags, ?)"
)
# What the tables of earlier versions lack.
_ADDED = {
    "attempt": ("estimated",),
    "rollup": ("unpriced", "unpriced_prompt", "unpriced_completion", "estimated"),
}


def add(db: sqlite3.Connection, records: Sequence[Record]) -> None:
    """Write records."""
    rows = [[getattr(record, name) for name in NAMES] for record in records]
    db.executemany(ADD, [[*row[:-1], json.dumps(dict(row[-1]))] for row in rows])


def record(row: Sequence[Any]) -> Record:
    """Return the record of a row with the columns `COLUMNS`."""
    *facts, degraded, estimated, tags = row
    return Record(*facts, degraded=bool(degraded), estimated=bool(estimated), tags=json.loads(tags))


def fill_in(db: sqlite3.Connection) -> None:
    """Let an earlier version's file be read as if it had every column; nothing is written."""
    for table, missing in _missing(db):
        nothing = ", ".join(f"0 AS {column}" for column in missing)
        db.execute(f"CREATE TEMP VIEW {table} AS SELECT *, {nothing} FROM main.{table}")


def migrate(db: sqlite3.Connection) -> None:
    """Add the columns that an earlier version's file lacks; that version can still write to it."""
    for table, missing in _missing(db):
        for column in missing:
            db.execute(f"ALTER TABLE main.{table} ADD COLUMN {column} DEFAULT 0")
        if table == "rollup":  # an unknown price counted as 0 there; what has not been pruned is summed up again
            db.execute("DELETE FROM rollup WHERE (SELECT pruned FROM rolled) = 0")
            db.execute("UPDATE rolled SET last = 0 WHERE pruned = 0")


def _missing(db: sqlite3.Connection) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for table, columns in _ADDED.items():
        known = {row[1] for row in db.execute(f"PRAGMA main.table_info({table})")}
        if known and (missing := [column for column in columns if column not in known]):
            found.append((table, missing))
    return found
