"""Reading one checkpoint from the files that people save, and choosing many; ``docs/formats.md`` lists the formats.

``reading`` is the entry. ``torch_files``, ``weights`` (safetensors) and ``folders`` read the containers, ``pickles``
the pickles of torch and NVlabs without running anything in them. ``keys`` finds the state dict in a file's content,
``modules`` names the weights of pickled networks, ``names`` reads paths, ``lora`` knows adapters. ``finding`` finds and
selects the checkpoints of a run.
"""

from lcsc_opt.checkpoints.names import checkpoint_series
from lcsc_opt.checkpoints.reading import (
    Checkpoint,
    checkpoint_step,
    module_weights,
    read_checkpoint,
    read_init_arguments,
    read_metadata,
)

__all__ = [
    "Checkpoint",
    "checkpoint_series",
    "checkpoint_step",
    "module_weights",
    "read_checkpoint",
    "read_init_arguments",
    "read_metadata",
]
