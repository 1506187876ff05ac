"""Reading one checkpoint from the files that people save, and choosing many; ``docs/formats.md`` lists the formats.

``reading`` is the way in. ``torch_files``, ``safetensors_files`` and ``folders`` are the containers, ``pickles``
reads what torch and NVlabs pickle without running any of it, ``keys`` finds the state dict in it, ``nvlabs`` and
``averages`` give names to weights that are saved without, ``names`` reads paths, ``lora`` knows adapters, and
``contents`` is what all of them hand on. ``finding`` finds and selects the checkpoints of a run.
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
