"""The recipe of a merged model: which checkpoints, with which coefficients, found by which trial.

Every exported model holds it. It is enough to merge the model again from the same checkpoints.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from lcsc_opt.base import VERSION
from lcsc_opt.base.errors import ObjectiveError, StudyStoreError, TrajectoryError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.settings import first_problem
from lcsc_opt.checkpoints.finding import shown_steps
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.checkpoints.reading import read_metadata
from lcsc_opt.coefficients.layer_groups import TensorRows
from lcsc_opt.coefficients.profiles import check_coefficients, index_of_trainer_ema, last_alone
from lcsc_opt.database.arrays import array_of, stored_array
from lcsc_opt.exports.chosen import Chosen
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.adapters import adapters_in

ENTRY = "lcsc_recipe"  # in the metadata of safetensors
FILE = "lcsc_recipe.json"  # in a folder that diffusers loads
_MAX_BYTES = 100_000_000  # of a recipe in an archive: a hostile one may unpack to more than fits into memory
_FORMAT = 1

Dtype = Literal["float32", "float16", "bfloat16"]
_Natural = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
_Positive = Annotated[int, pydantic.Field(ge=1, lt=2**31)]
_Rows = tuple[_Natural, Annotated[int, pydantic.Field(ge=0, le=9)], _Positive, _Positive]
_Sha256 = Annotated[str, pydantic.StringConstraints(pattern="^[0-9a-f]{64}$")]


class LoraNaming(pydantic.BaseModel):
    """What the names and the scale of a LoRA depend on, apart from its tensors.

    Attributes:
        component: ``unet`` or ``transformer``, for modules whose names do not tell.
        alphas: where tensors hold none.
        layers_per_block: the U-Net's setting of this name, on which kohya's names for SDXL depend.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="ignore")

    component: str = "unet"
    alphas: LoraAlphas = LoraAlphas()
    layers_per_block: Annotated[int, pydantic.Field(ge=1, le=100)] | None = None


class Recipe(pydantic.BaseModel):
    """How a model was merged.

    Attributes:
        format: the version of the recipe's own format.
        study: ``experiment/optimizer/seed``; the experiment's name, if no search found the model.
        trial: its number; ``None`` for an average without a search, and for a point between two models.
        model: what the report of its experiment calls it; ``None`` without a search.
        coefficients: ``[K]``, or a row for each of ``rows``.
        trainer_ema: the name of the average that the trainer kept with the last checkpoint, where it is that; ``None``
            for a combination.
        adapters: of how many adapters it is, whose base model is the checkpoint of step 0; ``None`` without that.
        rows: tensor → its rows of coefficients (:class:`~lcsc_opt.coefficients.layer_groups.TensorRows`: the first, the
            axis of its channels, their number, and how many share a row), where there are several.
        steps: ``[K]`` training steps of the checkpoints.
        checkpoint_sha256: ``[K]``, of each checkpoint's tensors.
        trajectory_sha256: the SHA-256 of all checkpoints together.
        stored: what the checkpoints' weights were rounded to; ``None`` if every bit was kept.
        key: which state dict of each checkpoint file; ``None`` if the training loop wrote the trajectory.
        dtype: the dtype of the exported model; ``None`` keeps that of each tensor.
        statistics: tensors that were computed from the merged model, such as those of batch normalization, as a
            safetensors file in hexadecimal digits.
        lora: for a LoRA under other names than its checkpoints': what these names depend on.
        loss: the loss of the search, or the score that it maximized; ``None`` without a search.
        metrics: that the search measured.
        held_out: the held-out report, where there is one.
        sampler: how the search made images, to which the model is tuned; ``None`` for a score.
        lcsc_opt: the version of this library.
        versions: the versions of the packages that it was computed with.
    """

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="ignore")

    format: int = _FORMAT
    study: str
    trial: int | None = None
    model: str | None = None
    coefficients: tuple[float, ...] | tuple[tuple[float, ...], ...]
    rows: dict[str, _Rows] | None = None
    trainer_ema: str | None = None
    adapters: int | None = None
    steps: tuple[int, ...]
    checkpoint_sha256: tuple[_Sha256, ...]
    trajectory_sha256: _Sha256
    stored: str | None = None
    key: str | None = None
    dtype: Dtype | None = None
    statistics: str | None = None
    lora: LoraNaming | None = None
    loss: float | None = None
    metrics: dict[str, pydantic.JsonValue] = {}
    held_out: dict[str, pydantic.JsonValue] | None = None
    sampler: dict[str, pydantic.JsonValue] | None = None
    lcsc_opt: str
    versions: dict[str, str | None] = {}

    @pydantic.field_validator("coefficients", mode="before")
    @classmethod
    def _unpacked(cls, coefficients: Any) -> Any:
        """Those that :meth:`as_text` has packed as numbers; and tuples for the lists of JSON."""
        if isinstance(coefficients, Mapping):
            try:
                coefficients = array_of(coefficients).tolist()
            except (KeyError, TypeError, ValueError, zlib.error) as error:
                raise ValueError("what is packed are no rows of numbers") from error
        if isinstance(coefficients, list):
            return tuple(tuple(row) if isinstance(row, list) else row for row in coefficients)
        return coefficients

    @pydantic.model_validator(mode="after")
    def _check(self) -> Recipe:
        """Refuse what no export writes, since a recipe may come from anywhere."""
        if self.format != _FORMAT:
            raise ValueError(f"format {self.format} was written by a newer version of lcsc_opt")
        if not self.steps:
            raise ValueError("it combines no checkpoints")
        if len(self.checkpoint_sha256) != len(self.steps):
            raise ValueError(f"{len(self.checkpoint_sha256)} hashes for {len(self.steps)} steps")
        last_row = max((rows.first + rows.row_count for rows in self.rows_of.values()), default=1)
        if last_row > len(self.coefficients):
            raise ValueError(f"a tensor has row {last_row} of {len(self.coefficients)}")
        return self

    @property
    def rows_of(self) -> dict[str, TensorRows]:
        """Tensor → its rows; empty where all have the same."""
        return {name: TensorRows(*numbers) for name, numbers in (self.rows or {}).items()}

    @classmethod
    def of(cls, trajectory: Trajectory, coefficients: Coefficients, **fields: Any) -> Recipe:
        """The recipe of a merge of these checkpoints, made with what is installed here.

        ``coefficients`` are ``[K]`` or ``[S, K]``; ``fields`` are further attributes, of which ``study`` must be one.
        """
        installed = environment()
        packages = installed["packages"]
        versions = {"python": installed["python"], "torch": packages["torch"], "numpy": packages["numpy"]}
        rows = None
        numbers = tuple(coefficients.tolist())
        if trajectory.layer_groups is not None and coefficients.ndim > 1:
            undone = trajectory.renaming.undone  # to the names of the files
            rows = {
                undone(name): (of.first, of.axis, of.channels, of.size)
                for name, of in trajectory.layer_groups.rows_of.items()
            }
            numbers = tuple(tuple(row) for row in coefficients.tolist())
        return cls(
            coefficients=numbers,
            rows=rows,
            steps=tuple(trajectory.steps),
            checkpoint_sha256=trajectory.checkpoint_sha256,
            trajectory_sha256=trajectory.sha256,
            stored=trajectory.stored,
            key=trajectory.metadata.get("key"),
            adapters=adapters_in(trajectory),
            lcsc_opt=VERSION,
            versions=versions,
            **fields,
        )

    @classmethod
    def of_chosen(cls, chosen: Chosen, objective: Objective, *, dtype: str | None = None) -> Recipe:
        """The recipe of a model of an experiment. Writes nothing, so a runner is not disturbed.

        Raises:
            ObjectiveError: the objective has no weights.
            StudyStoreError: the checkpoints are not those of the experiment.
        """
        if objective.trajectory is None:
            advice = ""
            if chosen.model.trial is not None:
                of_study = f'lcsc_opt.load_study("{chosen.model.study}").coefficients'
                advice = f"; in Python: lcsc_opt.Trajectory.open(PATH).merge({of_study})"
            raise ObjectiveError(
                f"{chosen.experiment}: its objective combines no weights, so there is no model to export{advice}"
            )
        trajectory = packed_trajectory(objective)
        coefficients = chosen.model.coefficients
        fields = dict(chosen.measured)
        if index_of_trainer_ema(coefficients, len(trajectory)) is not None:
            coefficients = last_alone(len(trajectory))  # the checkpoint that the average was kept with
            fields["trainer_ema"] = chosen.model.name
        is_same = chosen.trajectory_sha256 in (None, trajectory.sha256) and chosen.steps == trajectory.steps
        if not is_same:
            raise StudyStoreError(
                f"{chosen.experiment}: {trajectory.path} holds other checkpoints than those it was searched on; put "
                "them back, or start a new experiment"
            )
        study = chosen.model.study or chosen.experiment
        fields |= {"study": study, "trial": chosen.model.trial, "model": chosen.model.title}
        return cls.of(trajectory, coefficients, dtype=dtype, **fields)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe inside an exported model (a file, or a folder that diffusers loads), or in a JSON file.

        Raises:
            TrajectoryError: there is none, or it cannot be read.
        """
        if (path / FILE).is_file():
            path = path / FILE
        if not path.exists():
            raise TrajectoryError(
                f"{path} does not exist: name an exported model, a recipe or a study, or an average such as ema:0.9999."
            )
        try:
            text = _recipe_text(path)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, TrajectoryError) as error:
            raise TrajectoryError(
                f"{path} holds no recipe that can be read: name a model that lcsc exported."
            ) from error
        if text is None:
            raise TrajectoryError(
                f"{path} holds no recipe: expected a model that lcsc exported, or a recipe as JSON. For a study give "
                "its whole name, experiment/optimizer/seed; lcsc list has them."
            )
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise TrajectoryError(
                f"{path} holds a broken recipe ({first_problem(error)}): export the model again."
            ) from error

    def in_rows(self) -> Coefficients:
        """The coefficients ``[S, K]``; S is 1 without rows.

        Raises:
            StudySpecError: a row does not sum to one.
        """
        rows = range(len(self.coefficients)) if self.rows else None
        coefficients = check_coefficients(self.coefficients, len(self.steps), rows=rows)
        return coefficients.reshape(-1, len(self.steps))

    def find_needed(self, steps: Sequence[int]) -> dict[int, int]:
        """Find the checkpoints that are combined: their indices in the recipe → their indices in ``steps``.

        Raises:
            StudySpecError: the coefficients do not sum to one.
            TrajectoryError: one is missing.
        """
        coefficients = self.in_rows()
        needed = np.flatnonzero(coefficients.any(axis=0)).tolist()
        missing = sorted({self.steps[index] for index in needed} - set(steps))
        if missing:
            raise TrajectoryError(
                f"{len(missing)} of the {len(needed)} checkpoints that are combined are missing: "
                f"{shown_steps(missing)}. Name them, too; these steps were found: {shown_steps(sorted(steps))}."
            )
        return {index: steps.index(self.steps[index]) for index in needed}  # steps are distinct

    @property
    def title(self) -> str:
        """The name of the model, for people."""
        if self.trial is not None:
            return f"{self.study}, trial {self.trial}"
        if self.model is None:
            return self.study
        return f"{self.study}, {self.model}"

    def as_text(self) -> str:
        """One line of JSON, from which coefficients are read again bit for bit.

        Those of many rows are packed, since the text lies in the header of a file that other programs read.
        """
        fields = self.model_dump()
        if self.rows is not None:
            fields["coefficients"] = stored_array(np.array(self.coefficients))
        return json.dumps(fields)


def _recipe_text(path: Path) -> str | bytes | None:
    """The recipe in an exported file, or the content of a JSON file; ``None`` where an export would have one.

    Raises:
        OSError, RuntimeError, ValueError, zipfile.BadZipFile, TrajectoryError: the file cannot be read.
    """
    if path.suffix == ".json":
        return path.read_bytes()
    if path.suffix == ".safetensors":
        return read_metadata(path).get(ENTRY)
    if not path.is_file():
        return None
    with zipfile.ZipFile(path) as archive:
        entries = [name for name in archive.namelist() if name.rpartition("/")[2] == ENTRY]
        if not entries:
            return None
        with archive.open(entries[-1]) as entry:
            return entry.read(_MAX_BYTES)


def packed_trajectory(objective: Objective) -> Trajectory:
    """The packed checkpoints that an objective merges.

    Raises:
        ObjectiveError: there is none.
    """
    if isinstance(objective.trajectory, Trajectory):
        return objective.trajectory
    raise ObjectiveError("the objective's weights are not a packed trajectory, so there is no model to export")
