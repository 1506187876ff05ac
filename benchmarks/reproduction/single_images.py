"""The quality of single images while FID falls: one table of judges for the objectives of the study files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from common import markdown

