"""A study from its plan to its answer: ask, write the candidate, evaluate, write the result, tell.

``plan`` is what a study is made of, ``runner`` is the one loop, ``held_out`` is the final choice on other noise.
``study`` opens a study once and runs it, ``landscape`` is a study of a plane, ``studies`` is the Python interface.
"""
