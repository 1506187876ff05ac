"""Reading one checkpoint from the files that people save, and choosing many; ``docs/formats.md`` lists the formats.

``reading`` is the entry, and knows safetensors and folders. ``torch_files`` reads what torch and NVlabs pickled without
running anything in it, and ``content`` finds the state dict there. ``finding`` finds, orders and selects the
checkpoints of a run, ``lora`` knows adapters, ``weights`` writes and compares models.
"""
