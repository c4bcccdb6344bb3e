"""The climate twin: daily states of the atmosphere, generated, downscaled and judged in physical units."""
