"""What the workers of each machine were last seen doing, as a study stores it while it is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.records import NodeWork

NODES = "nodes"  # the attribute of a study


@dataclasses.dataclass(frozen=True)
class KeptNodes:
    """One look at the workers.

    Attributes:
        kept_at: seconds since 1970.
        nodes: of each machine.
    """

    kept_at: float
    nodes: tuple[NodeWork, ...]

    def as_stored(self) -> dict[str, Any]:
        """JSON-able."""
        rows = [
            {**dataclasses.asdict(node), "busy": None if node.busy is None else round(node.busy, 4)}
            for node in self.nodes
        ]
        return {"kept_at": round(self.kept_at, 3), "nodes": rows}

    @classmethod
    def parse(cls, stored: Any) -> KeptNodes | None:
        """The inverse of :meth:`as_stored`; ``None`` where nothing is kept."""
        if not isinstance(stored, Mapping):
            return None
        names = [field.name for field in dataclasses.fields(NodeWork)]
        nodes = tuple(NodeWork(**{name: row[name] for name in names}) for row in stored["nodes"])
        return cls(float(stored["kept_at"]), nodes)
