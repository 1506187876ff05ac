"""How the checkpoints of a trajectory are combined."""
