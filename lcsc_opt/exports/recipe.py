"""The recipe of a merged model: which checkpoints, with which coefficients, found by which trial.

Every exported model holds it. It is enough to merge the same bits again from the same checkpoints.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import ObjectiveError, StudyStoreError, TrajectoryError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.checkpoints.reading import read_metadata
from lcsc_opt.checkpoints.torch_files import read_content
from lcsc_opt.coefficients.profiles import check_coefficients
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import Trajectory

ENTRY = "lcsc_recipe"  # in the metadata of safetensors, and next to the state dict of a .pt file
FILE = "lcsc_recipe.json"  # in a folder that diffusers loads
_FORMAT = 1

Dtype = Literal["float32", "float16", "bfloat16"]
_Sha256 = Annotated[str, pydantic.StringConstraints(pattern="^[0-9a-f]{64}$")]


class LoraNaming(pydantic.BaseModel):
    """What the names and the scale of a LoRA depend on, apart from its tensors.

    Attributes:
        component: ``unet`` or ``transformer``, for modules whose names do not tell.
        alphas: where tensors hold none.
        layers_per_block: of the U-Net; kohya's names for SDXL depend on it.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="ignore")

    component: str = "unet"
    alphas: LoraAlphas = LoraAlphas()
    layers_per_block: Annotated[int, pydantic.Field(ge=1, le=100)] | None = None


class Recipe(pydantic.BaseModel):
    """How a model was merged.

    Attributes:
        format: of the recipe itself.
        method: the combination that :func:`merge_exactly` makes again bit for bit.
        study: ``experiment/optimizer/seed``.
        trial: its number; ``None`` for an average without a search.
        coefficients: ``[K]``, or a row for each of ``rows``.
        rows: group of layers → its tensors, where each has coefficients of its own.
        steps: ``[K]`` training steps of the checkpoints.
        checkpoint_sha256: ``[K]``, of each checkpoint's tensors.
        trajectory_sha256: of all checkpoints together.
        constant: tensors that were copied, since they are the same in all checkpoints.
        key: which state dict of each checkpoint file; ``None`` if the training loop wrote the trajectory.
        dtype: of the exported model; ``None`` is each tensor's own.
        statistics: tensors that were computed from the merged model, such as those of batch normalization, as a
            safetensors file in hexadecimal digits.
        lora: for a LoRA under other names than its checkpoints': what these names depend on.
        loss: of the search; ``None`` without a search.
        metrics: that the search measured.
        held_out: the held-out report, where there is one.
        lcsc_opt: the version of this library.
        versions: of the packages that it was computed with.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="ignore")

    format: int = _FORMAT
    method: Literal["linear"] = "linear"
    study: str
    trial: int | None = None
    coefficients: tuple[float, ...] | tuple[tuple[float, ...], ...]
    rows: dict[str, tuple[str, ...]] | None = None
    steps: tuple[int, ...]
    checkpoint_sha256: tuple[_Sha256, ...]
    trajectory_sha256: _Sha256
    constant: tuple[str, ...] = ()
    key: str | None = None
    dtype: Dtype | None = None
    statistics: str | None = None
    lora: LoraNaming | None = None
    loss: float | None = None
    metrics: dict[str, pydantic.JsonValue] = {}
    held_out: dict[str, pydantic.JsonValue] | None = None
    lcsc_opt: str
    versions: dict[str, str | None] = {}

    @pydantic.model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.format != _FORMAT:
            raise ValueError(f"format {self.format} is of a newer version of lcsc_opt")
        expected = (len(self.steps),) if self.rows is None else (len(self.rows), len(self.steps))
        if (shape := np.array(self.coefficients).shape) != expected or len(self.checkpoint_sha256) != expected[-1]:
            counts = f"coefficients {list(shape)}, {len(self.checkpoint_sha256)} hashes"
            raise ValueError(f"{counts} for {len(self.steps)} steps{' in rows' * (self.rows is not None)}")
        if any(later <= earlier for earlier, later in itertools.pairwise(self.steps)):
            raise ValueError("the steps do not increase")
        return self

    @classmethod
    def of(cls, trajectory: Trajectory, coefficients: Coefficients, **others: Any) -> Recipe:
        """The recipe of a merge of these checkpoints, made with what is installed here."""
        now, groups, rows = environment(), trajectory.layer_groups, None
        if groups is not None and coefficients.ndim > 1:
            tensors = [(groups.names[row], name) for name, row in groups.row_of.items()]
            rows = {group: tuple(sorted(name for own, name in tensors if own == group)) for group in groups.names}
        return cls(
            coefficients=tuple(tuple(row) if rows else row for row in coefficients.tolist()),
            rows=rows,
            steps=trajectory.steps,
            checkpoint_sha256=trajectory.checkpoint_sha256,
            trajectory_sha256=trajectory.sha256,
            constant=tuple(sorted(set(trajectory.names) - trajectory.varying)),
            key=trajectory.metadata.get("key"),
            lcsc_opt=VERSION,
            versions={"python": now["python"], **{name: now["packages"][name] for name in ("torch", "numpy")}},
            **others,
        )

    @classmethod
    def of_trial(
        cls, study: StoredStudy, objective: Objective, *, number: int | None = None, dtype: str | None = None
    ) -> Recipe:
        """The recipe of a study's best model so far, or of one trial. Writes nothing, so a runner is not disturbed.

        Raises:
            ObjectiveError: the objective has no weights.
            StudyStoreError: the checkpoints are not those of the study, or there is no such complete trial.
        """
        if objective.trajectory is None:
            raise ObjectiveError(
                f"{study.name}: its objective combines no weights, so there is no model to export; with checkpoints: "
                f"lcsc show {study.name} --format json > c.json, then lcsc apply c.json CHECKPOINTS"
            )
        trial, coefficients, attributes = study.chosen_trial(number)
        trajectory = packed_trajectory(objective)
        known = study.attributes["fingerprint"]["objective"].get("trajectory")
        other = isinstance(known, str) and known != trajectory.sha256
        if other or tuple(study.attributes["steps"]) != trajectory.steps:  # these would give another model, silently
            raise StudyStoreError(
                f"{study.name}: {trajectory.path} holds other checkpoints than those it was searched on; "
                "put them back, or start a new study"
            )
        return cls.of(
            trajectory,
            coefficients,
            study=study.name,
            trial=trial,
            dtype=dtype,
            loss=float(attributes["loss"]),
            metrics=attributes.get("metrics", {}),
            held_out=attributes.get("held_out"),
        )

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe inside an exported model (a file, or a folder that diffusers loads), or in a JSON file.

        Raises:
            TrajectoryError: there is none, or it cannot be read.
        """
        path = path / FILE if (path / FILE).is_file() else path
        if not path.exists():
            raise TrajectoryError(f"{path} does not exist: name an exported model, a recipe or a study.")
        text: Any = None
        try:
            if path.suffix == ".json":
                text = path.read_bytes()
            elif path.suffix == ".safetensors":
                text = read_metadata(path).get(ENTRY)
            elif path.is_file():
                content = read_content(path)
                text = content.get(ENTRY) if isinstance(content, dict) else None
        except (OSError, ValueError, TrajectoryError) as error:
            raise TrajectoryError(
                f"{path} holds no recipe that can be read: name a model that lcsc exported."
            ) from error
        if not isinstance(text, (str, bytes)):
            raise TrajectoryError(f"{path} holds no recipe: expected a model that lcsc exported, or a recipe as JSON.")
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = f"{where}: {first['msg']}".removeprefix(": ").removeprefix("Value error, ")
            raise TrajectoryError(f"{path} holds a broken recipe ({reason}): export the model again.") from error

    def in_rows(self) -> tuple[dict[str, int], Coefficients]:
        """Tensor → its row, and the coefficients ``[S, K]``. In one row, S is 1 and no tensor has another.

        Raises:
            StudySpecError: a row does not sum to one.
        """
        rows = () if self.rows is None else self.rows.values()
        row_of = {name: row for row, names in enumerate(rows) for name in names}
        checked = check_coefficients(self.coefficients, len(self.steps), rows=len(rows) or None)
        return row_of, checked.reshape(-1, len(self.steps))

    def needed_of(self, steps: Sequence[int]) -> dict[int, int]:
        """The checkpoints that are combined: their indices in the recipe → their indices in ``steps``.

        Raises:
            StudySpecError: the coefficients do not sum to one.
            TrajectoryError: one is missing.
        """
        needed = np.flatnonzero(self.in_rows()[1].any(axis=0)).tolist()
        if missing := sorted({self.steps[index] for index in needed} - set(steps)):
            raise TrajectoryError(
                f"{len(missing)} of the {len(needed)} checkpoints that are combined are missing: {_some(missing)}. "
                f"Name them, too; the steps that are there: {_some(sorted(steps))}."
            )
        return {index: steps.index(self.steps[index]) for index in needed}

    @property
    def title(self) -> str:
        """The name of the model, for people."""
        return self.study if self.trial is None else f"{self.study}, trial {self.trial}"

    def as_text(self) -> str:
        """One line of JSON; floats are written so that they are read again bit for bit."""
        return json.dumps(self.model_dump())


def _some(steps: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, steps[:most]))
    return f"{shown}, … {steps[-1]}" if len(steps) > most else shown or "none"


def packed_trajectory(objective: Objective) -> Trajectory:
    """The packed checkpoints that an objective merges.

    Raises:
        ObjectiveError: there is none.
    """
    if isinstance(objective.trajectory, Trajectory):
        return objective.trajectory
    raise ObjectiveError("the objective's weights are no packed trajectory, so there is no model to export")
