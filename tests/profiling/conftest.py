from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "objectives"))  # image_objectives: an extractor and a reference
