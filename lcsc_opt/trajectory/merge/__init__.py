"""How the checkpoints of a trajectory are combined.

``arithmetic`` merges tiles. ``placement`` chooses where from: a device's memory, this machine's, or the disk;
``memory`` knows how much there is, ``sources`` and ``reading`` give the bytes, and ``merger`` merges there.
"""
