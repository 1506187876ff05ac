"""How the checkpoints of a trajectory lie on the disk.

``layout`` says where each tensor is in a row, ``manifest`` what the rows are, ``differences`` how rows are stored
in fewer bits, ``row_writing`` makes a row of a checkpoint, ``saving`` names it in the manifest, ``rows`` and
``tiles`` map them.

The K checkpoints are the rows of one matrix, and its columns are the numbers of their tensors. What is read of it:

- a *segment*: the columns of tensors of one dtype that are neighbours;
- a *window*: the columns of a segment that are in memory at once;
- a *tile*: the columns of a window that one product combines, few enough for a processor's cache.

A row's place in the file is its slot; rows that are stored as differences lie in panels of ``PANEL`` rows, and numbers
that share a scale are a block.
"""
