"""Domains: what a sample is, where true samples come from, how physics acts on one and how one is judged."""
