"""What the forkserver imports last: its processes then share what is the same for all of them."""

from __future__ import annotations

import gc

from optuna.storages import RDBStorage

from tests import migrations

migrations.read_once()
RDBStorage("sqlite://").engine.dispose()
gc.collect()
gc.freeze()  # a collection in a forked process would copy what it looks at
