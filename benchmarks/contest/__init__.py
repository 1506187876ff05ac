"""The parts of ``benchmarks/optimizers.py``: the contenders, running and measuring them, tables and figures."""
