"""What a provider needs before it is asked: keys, Copilot logins, and the embedded model.

Imports `config` and the foundation. Start at `credentials.py`.
"""
