"""Reading one checkpoint from the files that people save, and choosing many; ``docs/formats.md`` lists the formats.

``reading`` is the entry, and knows safetensors and folders. ``torch_files`` reads what torch and NVlabs pickled without
running anything in it, and ``content`` finds the state dict there. ``finding`` finds, orders and selects the
checkpoints of a run, ``lora`` knows adapters, ``weights`` writes and compares models.
"""

from lcsc_opt.checkpoints.finding import checkpoint_series, checkpoint_step
from lcsc_opt.checkpoints.reading import (
    Checkpoint,
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
