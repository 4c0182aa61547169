"""The waterfall as a server of OpenAI's and Anthropic's APIs, on a Unix socket and on a TCP port with keys.

Imports `client` and `monitoring`. Start at `app.py` for the routes, at `dialects.py` for the APIs, at `server.py` for
sockets and shutdown.
"""
