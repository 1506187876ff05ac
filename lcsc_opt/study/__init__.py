"""A study from its specification to its answer: ask, write the candidate, evaluate, write the result, tell.

``planning`` is what a study does with its objective. ``running`` runs studies of one database: each is compared with
what is stored (``comparison``), rehearsed (``rehearsal``), and searched (``opening``). ``runner`` is the one loop,
``yardstick`` what losses are relative to, ``held_out`` the report and ``choice`` the answer. ``resources`` is what a
study needs from outside, ``landscape`` a study of a plane, ``origin`` where a search with a ``start`` begins; ``api``
and ``calling`` are the interfaces for Python.
"""
