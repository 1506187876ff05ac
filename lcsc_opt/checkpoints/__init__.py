"""Reading one checkpoint from the files that people save, and choosing many; ``docs/reference.md`` lists the formats.

``reading`` is the entry: it reads safetensors itself, ``folders`` finds the weights of a folder, ``distributed`` reads
the sharded ones, and ``torch_files`` reads what torch and NVlabs pickled, by the machine of ``pickles`` that runs
nothing. ``inventory`` finds the state dict in it, and ``modules`` the weights of whole networks. ``finding`` finds and
selects the checkpoints of a run, with ``names`` for their series, and ``order`` by ``counters``; ``lora`` reads the
names of adapters, ``matching`` those of averages, ``weights`` writes and compares models; ``rewriting`` gives a
trainer's file other weights, with ``copying`` for what lies beside them; ``watched`` sees files that change. ``table``
shows what all of these decide.
"""
