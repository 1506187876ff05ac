"""The parts of ``benchmarks/optimizers.py``: what competes, how it is run and measured, and what is made of it."""
