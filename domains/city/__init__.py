"""The city twin: what a change in traffic does to congestion, CO2, air and people."""
