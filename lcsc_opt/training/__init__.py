"""Trainings that leave trajectories behind.

Two things train here. The first is ``lcsc train``: ``preparing`` checks the request, and ``trainer`` is the loop over
the losses of ``recipes/``, on any device through Accelerate. ``data``, ``latents``, ``models`` and ``curve`` belong to
it. The second are the shipped objectives, which train their small networks when a study first needs them:
``on_demand`` is the loop over the losses of ``consistency`` and ``diffusion``. ``classifier``, ``images`` and
``scoring`` measure how good the samples are. ``networks`` serves both.
"""
