"""Generators: models that learn p(sample | condition) and draw from it."""
