"""Trainings that leave trajectories behind.

Two things train here. ``lcsc train``: ``preparing`` checks what was asked for, ``trainer`` is the loop, on any device
through Accelerate, over the losses of ``recipes/``; ``data``, ``latents``, ``models`` and ``curve`` are its own. The
shipped objectives train their small networks when a study first needs them: ``on_demand`` is the loop, over the losses
of ``consistency`` and ``diffusion``; ``classifier``, ``images`` and ``scoring`` say how good the samples are.
``networks`` serves both.
"""
