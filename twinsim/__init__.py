"""twinsim: learn how a real system behaves, generate scenarios of it, check each by its physics, score it against held-out truth."""

__version__ = "0.1.0"
