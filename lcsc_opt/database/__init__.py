"""The study database: written trial by trial, read as the history of a study.

``connection`` opens it, ``lock`` lets one process run a study, ``store`` writes candidates and results. ``reader``
reads new trials; ``history`` and ``report`` are the records of it. ``names`` decides what studies are called and which
losses compare.
"""
