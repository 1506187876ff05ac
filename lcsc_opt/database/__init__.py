"""The study database: written trial by trial, read as the history of a study.

``connection`` opens it, ``tables`` are the statements over Optuna's tables, ``lease`` lets one coordinator write,
``store`` writes candidates and results, ``reader`` reads what is new, ``history`` and ``summary`` are what was
read, ``names`` what studies are called and which losses compare.
"""
