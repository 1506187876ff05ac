"""Trainings that leave trajectories behind.

``lcsc train``: ``preparing`` checks what is asked for, and ``trainer`` is the loop over the losses of ``recipes/``, on
any device. ``data`` and ``models`` belong to it. ``networks`` has small ones, also for the shipped
objectives.
"""
