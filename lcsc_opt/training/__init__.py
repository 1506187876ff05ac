"""Trainings that leave trajectories behind.

``lcsc train``: ``preparing`` checks what is asked for, and ``trainer`` is the loop over the losses of ``recipes/``, on
any device through Accelerate. ``data`` and ``models`` belong to it. Small networks (the shipped objectives' models,
autoencoders) are those of ``networks``, trained by the plain loop :func:`lcsc_opt.base.descent.descend`.
"""
