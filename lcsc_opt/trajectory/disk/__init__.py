"""How the checkpoints of a trajectory lie on the disk."""
