"""A study from its specification to its answer: ask, write the candidate, evaluate, write the result, tell.

``running`` runs the studies of one database, one after the other. Each is opened by ``searching``: compared with what
is stored (``comparison``), planned with its objective (``planning``), rehearsed (``rehearsal``), and searched by the
one ``loop``. ``yardstick`` is what losses are relative to, ``held_out`` the report, whose models are measured by
``measuring`` and compared in ``report_rows`` and ``report_warnings``; ``choice`` is the answer, ``outcome`` its line.
``landscape`` is a study of a plane, ``origin`` where a search with a ``start`` begins. ``api`` and ``calling`` are the
interfaces for Python.
"""
