"""The command line: each command parses its options, calls one function and prints.

Imports everything, mostly inside the commands, so that `biollm --help` stays fast. Start at `app.py`.
"""

from biollm.cli.app import main

__all__ = ["main"]
