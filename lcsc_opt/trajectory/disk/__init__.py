"""How the checkpoints of a trajectory lie on the disk.

``layout`` says where each tensor is in a row, ``manifest`` what the rows are, ``differences`` how rows are stored
in fewer bits, ``row_writing`` makes a row of a checkpoint, ``saving`` names it in the manifest, ``rows`` and
``tiles`` map them. :mod:`lcsc_opt.trajectory` says what the pieces of their matrix
are called.
"""
