"""The waterfall as an OpenAI-compatible server, on a Unix socket and, if asked for, on a TCP port with keys.

Imports `client` and `monitoring`. Start at `app.py` for the routes, at `server.py` for sockets and shutdown.
"""
