"""What the forkserver imports last: its processes then share what is the same for all of them."""

from __future__ import annotations

import gc
import math

from optuna.storages import RDBStorage

from lcsc_opt.sampling import layout
from tests import migrations

migrations.read_once()
RDBStorage("sqlite://").engine.dispose()
layout.SECONDS_TO_SHORTEN = math.inf  # as in conftest.py: no layout is chosen by time
gc.collect()
gc.freeze()  # a collection in a forked process would copy what it looks at
