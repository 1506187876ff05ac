"""A study from its plan to its answer: ask, write the candidate, evaluate, write the result, tell.

``plan`` is what a study is made of, ``runner`` is the one loop, ``held_out`` is the final choice on other noise.
``experiment`` runs a plan under its lock, ``landscape`` is a study of a plane, ``studies`` is the Python interface.
"""
