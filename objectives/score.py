"""Any model and any score of it: accuracy, perplexity, a success rate, a harness.

    objective:
      file: score.py
      settings:
        checkpoints: runs/*.pt
        model: my:build           # () -> torch.nn.Module; or a folder for transformers or diffusers
        score: my:accuracy        # (model) or (model, draw) -> a number
        maximize: true

``my`` is imported like any module; it may also be in the working directory or next to the study file. docs/score.md has
more; studies/any_weights/ has a score of a language model, and one that runs a command.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.imports import import_dotted, import_extra
from lcsc_opt.base.libraries import quiet_libraries
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.settings import Count, parse_settings
from lcsc_opt.coefficients.profiles import last_alone
from lcsc_opt.objective.model_files import digests, network_files
from lcsc_opt.objective.network_scorer import NetworkScorer
from lcsc_opt.objective.settings import CheckpointSettings
from lcsc_opt.objective.weight_score import WeightScore
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.sampling.network import unshared


class Settings(CheckpointSettings):
    """The settings of all objectives that merge checkpoints, and these.

    Attributes:
        model: ``module:function``, which returns the network; or a folder that ``save_pretrained`` of transformers or
            diffusers wrote, whose configuration is used.
        score: ``module:function``, called with the model, and with ``draw`` if it has a parameter of that name.
        maximize: whether higher is better.
        size: the number of items of a ``draw`` of the search, if the score asks for it.
        held_out: ``module:function``, called like ``score``: the score of the final report, on data that no search
            sees. The answer is still chosen by ``score``.
        batch_norm: ``module:function``, called like ``score``; passes data through the model, from which the statistics
            of batch normalization are estimated again.
        repeats: how often a model is scored, for a score that is random; the mean counts, and its error is reported.
    """

    model: str
    score: str
    maximize: bool = False
    size: Annotated[int, Field(ge=2)] | None = None
    held_out: str | None = None
    batch_norm: str | None = None
    repeats: Count = 1

    @property
    def merges_statistics(self) -> bool:
        """Only ``batch_norm`` estimates them."""
        return self.batch_norm is None

    def scorer(self, context: BuildContext) -> NetworkScorer:
        """What scores merged weights.

        Raises:
            ObjectiveError: functions, folder or device are missing, or are not what they should be.
        """
        score = import_dotted(self.score, setting="score", functions=context.functions)
        model_files = None
        names = [self.score]
        if _is_function(self.model, context):
            names.insert(0, self.model)
        else:  # wherever the folder is, its files count
            model_files = digests(network_files(_folder(self.model, context)))
        if self.batch_norm is not None:
            names.append(self.batch_norm)
        return NetworkScorer(
            _network(self.model, context),
            score,
            self,
            held_out=_optional(self.held_out, "held_out", context),
            batch_norm=_optional(self.batch_norm, "batch_norm", context),
            name=", ".join(names),
            held_out_name=self.held_out,
            model_files=model_files,
            repeats=self.repeats,
        )


def build(settings: dict[str, Any], context: BuildContext) -> WeightScore:
    """Build the model, and load the last checkpoint into it, so that a misfit fails now."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    scorer = checked.scorer(context)
    trajectory = checked.trajectory(context).fitting(scorer.state)
    if checked.size is not None and not scorer.takes_draw:
        raise ObjectiveError("size: the score has no argument draw, which would contain it; leave size out")
    scorer.load(trajectory.merge(last_alone(len(trajectory.steps))))
    scorer.estimate_statistics(trajectory.varying)
    return WeightScore(trajectory, scorer, maximize=checked.maximize, size=checked.size)


def _optional(name: str | None, setting: str, context: BuildContext) -> Callable[..., Any] | None:
    """The function of that name, ``module:function``; ``None`` without a name."""
    if name is None:
        return None
    return import_dotted(name, setting=setting, functions=context.functions)


def _is_function(model: str, context: BuildContext) -> bool:
    """Whether a model is ``module:function``, and no folder with a colon in its path."""
    return ":" in model and not context.path(model).exists()


def _folder(model: str, context: BuildContext) -> Path:
    """A model's folder. Raises ObjectiveError if it does not exist."""
    path = context.path(model)
    if not path.is_dir():
        raise ObjectiveError(
            f"model: {model} is no folder; where it moved, name its new place: "
            "lcsc run FILE objective.settings.model=PLACE"
        )
    return path


def _made(model: str, context: BuildContext) -> Any:
    """What the user's function returns, or a network of a folder's class with random weights.

    Raises:
        ObjectiveError: the model does not exist, or the installed transformers or diffusers lacks its class.
    """
    if _is_function(model, context):
        return import_dotted(model, setting="model", functions=context.functions)()
    folder = _folder(model, context)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # DiffusersFolder says what is missing
        config = {}
    if config.get("model_type"):  # as transformers writes, and diffusers does not
        architectures = config.get("architectures") or [None]
        return _made_by_transformers(folder, architectures[0], model)
    return DiffusersFolder.read(folder).network()


def _made_by_transformers(folder: Path, architecture: str | None, model: str) -> Any:
    """A network of transformers with random weights; no code in its folder is run.

    Args:
        folder: with its ``config.json``.
        architecture: the first one that this names; ``None`` if it names none.
        model: the setting, for messages.
    """
    transformers = import_extra("transformers")
    network_class: Any = getattr(transformers, str(architecture), None)
    if not (isinstance(network_class, type) and issubclass(network_class, transformers.PreTrainedModel)):
        version = transformers.__version__
        raise ObjectiveError(
            f"model: {model}: expected architectures that transformers {version} has, got {architecture!r}"
        )
    with quiet_libraries():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return network_class(config)


def _network(model: str, context: BuildContext) -> nn.Module:
    """The network of the setting ``model``, with weights that each candidate replaces."""
    try:
        network = _made(model, context)
    except LcscError:
        raise
    except Exception as error:  # of the user's code, or of transformers
        raise ObjectiveError(f"model: {model}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(network, nn.Module):
        raise ObjectiveError(f"model: {model} returned a {type(network).__name__}; expected a torch.nn.Module")
    return unshared(network)
