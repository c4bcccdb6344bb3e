"""The robotics twin: demonstrations in, trajectories that hold in the simulator out."""
