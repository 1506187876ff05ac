"""Trainings that leave trajectories behind.

``lcsc train``: ``preparing`` checks the request, and ``trainer`` is the loop over the losses of ``recipes/``, on any
device through Accelerate. ``data``, ``latents``, ``models`` and ``curve`` belong to it. Small networks (the shipped
objectives' models, autoencoders, the classifiers of ``images`` whose features judge samples) are trained by the plain
loop in ``networks``.
"""
