"""biollm: one call that always gets an answer, from free APIs down to a model on this machine."""

__version__ = "0.1.0"
