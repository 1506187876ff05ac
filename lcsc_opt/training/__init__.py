"""Trainings that leave trajectories behind.

``lcsc train``: ``preparing`` checks what is asked for, and ``trainer`` is the loop over the losses of ``recipes/``, on
any device through Accelerate. ``data`` and ``models`` belong to it. Small networks (the shipped objectives' models,
autoencoders, the classifiers of ``images`` whose features score samples) are trained by the plain loop in ``networks``.
"""
