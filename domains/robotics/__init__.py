"""The robotics twin: demonstrations in, simulator-verified trajectories of a robot out, and models fitted to real recordings."""
