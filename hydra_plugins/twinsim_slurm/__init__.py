"""Hydra finds its plugins in this namespace, and ours in here."""
