"""For ``benchmarks/paper.py``: the paper's numbers and claims, and the page that says which claims hold."""
