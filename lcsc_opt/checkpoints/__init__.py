"""Reading one checkpoint from the files that people save, and choosing many; ``docs/formats.md`` lists the formats.

``reading`` is the entry. ``torch_files``, ``safetensors_files`` and ``folders`` read the containers; ``pickles`` reads
the pickles of torch and NVlabs without running anything in them; ``keys`` finds the state dict in a file's content;
``nvlabs`` and ``averages`` name weights that are saved without names; ``names`` reads paths; ``lora`` knows adapters;
``contents`` has the types that all of them share. ``finding`` finds and selects the checkpoints of a run.
"""

from lcsc_opt.checkpoints.keys import GUESSED_KEYS
from lcsc_opt.checkpoints.names import checkpoint_series
from lcsc_opt.checkpoints.reading import (
    TORCH_SUFFIXES,
    Checkpoint,
    checkpoint_step,
    module_weights,
    read_checkpoint,
    read_init_arguments,
    read_metadata,
    strip_wrappers,
)

__all__ = [
    "GUESSED_KEYS",
    "TORCH_SUFFIXES",
    "Checkpoint",
    "checkpoint_series",
    "checkpoint_step",
    "module_weights",
    "read_checkpoint",
    "read_init_arguments",
    "read_metadata",
    "strip_wrappers",
]
