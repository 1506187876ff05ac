"""One experiment: its problem, its searches, what was measured, its report and its answer."""
