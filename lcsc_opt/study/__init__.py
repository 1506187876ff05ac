"""A study from its plan to its answer: ask, write the candidate, evaluate, write the result, tell.

``plan`` is the specification of a study. ``resources`` reads what ``resolving`` decides from: what is stored, what
changed, what will be written. ``execution`` runs what is resolved: ``runner`` is the one loop, ``held_out`` the final
choice on other noise. ``landscape`` is a study of a plane, ``api`` and ``calling`` are the interfaces for Python.
"""
