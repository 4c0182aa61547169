"""Text and files that go along with a prompt: reading, estimating tokens, condensing to what fits.

Start at `condense.py`. Imports only what is below it: `errors`, `_files`, the standard library. Only `read.py` does I/O.
"""
