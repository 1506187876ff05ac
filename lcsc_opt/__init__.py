"""Search the linear combination of saved checkpoints that samples best (LCSC, Liu et al. 2024)."""

__version__ = "0.1.0"
