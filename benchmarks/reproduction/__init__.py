"""For ``benchmarks/paper.py``: the paper's numbers, what is claimed of them, and the page that says what holds."""
