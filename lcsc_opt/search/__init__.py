"""A study from its plan to its answer: ask, write the candidate, evaluate, write the result, tell.

``plan`` is what a study is made of, ``runner`` the one loop, ``held_out`` the final choice on other noise,
``experiment`` what runs a plan under its lease, ``landscape`` a study of a plane, ``studies`` the face for Python.
"""
