"""The study database: written trial by trial, read as the history of a study.

``connection`` opens it, ``lock`` lets one coordinator write, ``tables`` has the
statements over Optuna's tables, ``store`` writes candidates and results, and ``inheriting`` copies studies. ``reader``
reads what is new; ``history``, ``nodes``, ``judges`` and ``cross_check`` are the records of it; ``comparing`` and
``summary`` compare studies. ``names`` decides what studies are called and which losses compare.
"""
