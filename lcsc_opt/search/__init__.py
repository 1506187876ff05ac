"""A study from its plan to its answer: ask, write the candidate, evaluate, write the result, tell."""
