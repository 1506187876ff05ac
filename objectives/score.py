"""Any model and any score of it: accuracy, perplexity, a success rate, a harness.

    objective:
      file: score.py
      settings:
        checkpoints: runs/*.pt
        model: my:build           # () -> torch.nn.Module; or a folder for transformers or diffusers
        score: my:accuracy        # (model) or (model, draw) -> a number
        maximize: true

or with a command in place of ``score``, which gets each merged model on the disk::

        model: runs/checkpoint-500                 # configuration and tokenizer
        command: lm_eval --model hf --model_args pretrained={model} --tasks arc_easy --output_path {out}
        read: results.arc_easy.acc
        maximize: true

or, for a causal language model, with ``text: corpus.txt``: its cross-entropy on that file.

``my`` is imported like any module; it may also be in the working directory or next to the study file. docs/score.md has
more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator
from torch import nn

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.imports import import_dotted, import_extra, quiet_libraries
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.command_scorer import CommandScorer
from lcsc_opt.objective.model_files import digests, network_files
from lcsc_opt.objective.network_scorer import NetworkScorer
from lcsc_opt.objective.settings import CheckpointSettings
from lcsc_opt.objective.text_loss import TextLoss
from lcsc_opt.objective.weight_score import WeightScore, why_no_report
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.trajectory import Trajectory


class Settings(CheckpointSettings):
    """The settings of all objectives that merge checkpoints, and these.

    Attributes:
        model: ``module:function``, which returns the network; or a folder that ``save_pretrained`` of transformers or
            diffusers wrote, whose configuration is used. For a command a folder, or nothing.
        score: ``module:function``, called with the model, and with ``draw`` if it has a parameter of that name.
        command: scores a model on the disk.
        text: a text file, on which the cross-entropy of a causal language model is measured, with the tokenizer in the
            folder ``model``. Searches and reports use different parts of it.
        read: where its number is in the JSON that the command writes.
        maximize: whether higher is better.
        size: the number of items of a ``draw`` of the search, if the score asks for it.
        held_out: ``module:function``, called like ``score``: the score of the final report, on data that no search
            sees. The answer is still chosen by ``score``.
        batch_norm: ``module:function``, called like ``score``; passes data through the model, from which the statistics
            of batch normalization are estimated again.
    """

    model: str | None = None
    score: str | None = None
    command: str | None = None
    text: str | None = None
    read: str | None = None
    maximize: bool = False
    size: Annotated[int, Field(ge=2)] | None = None
    held_out: str | None = None
    batch_norm: str | None = None

    @model_validator(mode="after")
    def _one_score(self) -> Settings:
        given = [name for name in ("score", "command", "text") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("expected one of score, command and text")
        if self.command is None and self.model is None:
            raise ValueError(f"{given[0]} needs a model: module:function, or a folder")
        if self.text is not None and ":" in (self.model or ""):
            raise ValueError("text needs a model's folder, in which its tokenizer is")
        if self.read is not None and self.command is None:
            raise ValueError("read belongs to a command")
        if self.batch_norm is not None and self.command is not None:
            raise ValueError("batch_norm belongs to a score")
        if self.held_out is not None and self.score is None:
            raise ValueError("held_out belongs to a score; a command is told {group}")
        asks_for_size = "{size}" in (self.command or "") or "{size}" in (self.read or "")
        if asks_for_size and self.size is None:
            raise ValueError("the command asks for a {size}; give size")
        return self

    def check(self, context: BuildContext) -> None:
        """The checks of all objectives that merge checkpoints; also that functions, folder and command exist."""
        super().check(context)
        if self.command is not None:
            self.scorer(context)
            return
        self._score(context)
        self._function("held_out", context)
        self._function("batch_norm", context)
        _network_factory(self.model or "", context)

    def scorer(self, context: BuildContext) -> NetworkScorer | CommandScorer:
        """What scores merged weights.

        Raises:
            ObjectiveError: functions, folder, command or device are missing, or are not what they should be.
        """
        if self.command is not None:
            folder = None if self.model is None else _folder(self.model, context)
            return CommandScorer(self.command, context, read=self.read, folder=folder)
        score = self._score(context)
        measured = score.name if isinstance(score, TextLoss) else self.score
        model = self.model
        assert model is not None  # see _one_score
        model_files = None
        names = [measured, self.held_out, self.batch_norm]
        if _is_function(model, context):
            names.insert(0, model)
        else:  # wherever the folder is, its files count
            model_files = digests(network_files(_folder(model, context)))
        return NetworkScorer(
            _network(model, context),
            score,
            self,
            held_out=self._function("held_out", context),
            batch_norm=self._function("batch_norm", context),
            name=", ".join(name for name in names if name),
            model_files=model_files,
        )

    def trajectory_alone(self, context: BuildContext) -> Trajectory | None:
        """The checkpoints, unless statistics of batch normalization are estimated for each merge."""
        return self.trajectory(context) if self.batch_norm is None else None

    def _score(self, context: BuildContext) -> Callable[..., Any]:
        """What scores a network, where no command does."""
        if self.text is not None:
            return TextLoss(context.path(self.text), _folder(self.model or "", context))
        function = self._function("score", context)
        assert function is not None  # see _one_score
        return function

    def _function(self, setting: str, context: BuildContext) -> Callable[..., Any] | None:
        """The function that a setting names; ``None`` where it names none."""
        name = getattr(self, setting)
        if name is None:
            return None
        return import_dotted(name, setting=setting, functions=context.functions)

    def why_no_gradient(self, context: BuildContext) -> str | None:
        """Why there is no gradient. This calls the score once, with the weights that the model begins with."""
        return self.scorer(context).why_no_gradient(None, self.size)

    def why_no_report(self, context: BuildContext) -> str | None:
        """Why a report could not be measured. This calls a score that draws its data twice, on the last checkpoint."""
        scorer = self.scorer(context)
        if not scorer.takes_draw:
            return None
        return why_no_report(scorer, self.last_weights(context), self.size)


def build(settings: dict[str, Any], context: BuildContext) -> WeightScore:
    """Build the model, and load the last checkpoint into it, so that a misfit fails now."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    scorer = checked.scorer(context)
    trajectory = checked.trajectory(context)
    if checked.size is not None and not scorer.takes_draw:
        raise ObjectiveError("size: the score has no argument draw, which would contain it; leave size out")
    if isinstance(scorer, NetworkScorer):
        last_checkpoint = np.zeros(len(trajectory.steps))
        last_checkpoint[-1] = 1.0
        scorer.load(trajectory.merge(last_checkpoint))
        merged_statistics = scorer.merged_statistics(trajectory.varying)
        if merged_statistics:
            notice(
                f"{merged_statistics[0]}: statistics of batch normalization are merged, "
                "and merged variances may be negative; "
                "batch_norm: module:function in the objective's settings estimates them again"
            )
    return WeightScore(trajectory, scorer, maximize=checked.maximize, size=checked.size)


def _is_function(model: str, context: BuildContext) -> bool:
    """Whether a model is ``module:function``, and no folder with a colon in its path."""
    return ":" in model and not context.path(model).exists()


def _folder(model: str, context: BuildContext) -> Path:
    """A model's folder.

    Raises:
        ObjectiveError: it does not exist.
    """
    path = context.path(model)
    if not path.is_dir():
        raise ObjectiveError(
            f"model: {model} is no folder; where it moved, name its new place: "
            "lcsc run FILE objective.settings.model=PLACE"
        )
    return path


def _network_factory(model: str, context: BuildContext) -> Callable[[], Any]:
    """The function that makes the network: the user's; or one for a folder's class, with random weights.

    Raises:
        ObjectiveError: the model does not exist, or the installed transformers or diffusers lacks its class.
    """
    if _is_function(model, context):
        return import_dotted(model, setting="model", functions=context.functions)
    folder = _folder(model, context)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if config.get("model_type"):
        architectures = config.get("architectures") or [None]
        return _transformers_factory(folder, architectures[0], model)
    return DiffusersFolder.read(folder).network


def _transformers_factory(folder: Path, architecture: str | None, model: str) -> Callable[[], Any]:
    """The function that makes a network of transformers, without running any code in its folder."""
    transformers = import_extra("transformers")
    network_class: Any = getattr(transformers, str(architecture), None)
    if not (isinstance(network_class, type) and issubclass(network_class, transformers.PreTrainedModel)):
        version = transformers.__version__
        raise ObjectiveError(
            f"model: {model}: expected architectures that transformers {version} has, got {architecture!r}"
        )

    def make() -> Any:
        with quiet_libraries():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return network_class(config)

    return make


def _network(model: str, context: BuildContext) -> nn.Module:
    make = _network_factory(model, context)
    try:
        network = make()
    except LcscError:
        raise
    except Exception as error:
        raise ObjectiveError(f"model: {model}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(network, nn.Module):
        raise ObjectiveError(f"model: {model} returned a {type(network).__name__}; expected a torch.nn.Module")
    return network
