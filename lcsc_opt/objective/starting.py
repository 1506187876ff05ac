"""A first study file for a folder of checkpoints. It holds what the folder tells; the rest is marked."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.study_file import FILL_IN, experiment_name
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.checkpoints.lora import lora_flavour
from lcsc_opt.checkpoints.reading import read_checkpoint, read_init_arguments
from lcsc_opt.metrics.reference.images import ImageSet
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.sources import find_sources

REFERENCE = "a folder of real images, an .npz with mu and sigma, or a data set such as cifar10-train"
_SCORE = "score.py"
_NOISE_LEVEL = re.compile(r"time|temb|t_emb|noise|sigma", re.IGNORECASE)
Ask = Callable[[str, str], "str | None"]
"""(setting, its meaning) → the user's answer; ``None`` leaves the setting to be filled in later."""


def draft(folder: Path, *, reference: str | None, ask: Ask) -> tuple[str, str, list[str]]:
    """Look at checkpoints, and draft a study file for them.

    Args:
        folder: of checkpoints, a glob, or a packed trajectory.
        reference: the real images; ``None`` if the user has not named them.
        ask: asks the user for what cannot be found out.

    Returns:
        The text of the file; what the folder holds, in one line; and the settings that only the user knows, by their
        names in the file.

    Raises:
        TrajectoryError: there are no checkpoints, or those of several models.
    """
    if is_packed(folder):
        trajectory = Trajectory.open(folder)
        steps, tensors, first = trajectory.steps, trajectory.checkpoint(-1), folder
    else:
        sources = find_sources(find_checkpoints(folder))
        first = next(iter(sources.values()))
        steps, tensors = tuple(sources), read_checkpoint(first).tensors
    kind, settings = _objective(folder, first, tensors, of_images=reference is not None)
    settings = {"checkpoints": (json.dumps(str(folder)), "a folder, a glob, or a packed trajectory"), **settings}
    if kind != _SCORE:
        near = _images_near(folder) if reference is None else reference
        settings["reference"] = (near, REFERENCE if near is None else "the real images")
        if near is None or not near.strip('"').endswith(".npz"):  # statistics know no single images
            settings["keep"] = ("precision", "stays where the best average has it; not with a file of statistics")
        settings["images"] = ("2000", "an evaluation samples so many; the paper takes 10,000")
    missing, lines = [], []
    for name, (known, comment) in settings.items():
        value = known if known is not None else ask(name, comment)
        if value is None:
            missing.append(f"objective.settings.{name}")
        shown = json.dumps(f"{FILL_IN}: {comment}") if value is None else value
        lines.append(f"    {name}: {shown}".ljust(50) + ("" if value is None else f"  # {comment}"))
    found = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}, for objectives/{kind}"
    name = json.dumps(experiment_name(folder.resolve().name.removesuffix(".trajectory")) or "study", ensure_ascii=False)
    search = _OF_IMAGES if kind != _SCORE else _OF_COMMAND if "command" in settings else _OF_SCORE
    return _TEXT.format(found=found, name=name, kind=kind, settings="\n".join(lines), search=search), found, missing


_TEXT = """\
# {found}. lcsc run FILE --dry-run says what is still to be filled in.
name: {name}
objective:
  file: {kind}
  settings:
{settings}
{search}seeds: [0]
storage: sqlite:///studies.db
"""
_GRID = "  - EMAGrid          # the best plain average of the checkpoints, to compare with\n"
_OF_IMAGES = f"""\
space: {{rows: layers}}   # coefficients for each layer; with fewer than ten real images a feature: affine
optimizers:
{_GRID}\
  - LCSCGradient     # follows the gradient of FID; take LCSCQuadratic where loss or sampler have none
budget: {{evaluations: 300}}
held_out: {{images: 10000, top: 5}}   # the answer is chosen and reported on other noise
"""
_OF_SCORE = f"""\
space: affine
optimizers:
{_GRID}\
  - LCSCGradient     # follows the gradient of the score; take LCSCQuadratic where it has none
budget: {{evaluations: 100}}
held_out: {{images: 5000, top: 5}}    # the answer is chosen and reported on other data; without draw: leave it out
"""
_OF_COMMAND = f"""\
space: affine
optimizers:
{_GRID}\
  - LCSCQuadratic    # needs no gradient
budget: {{evaluations: 60}}
"""


def _objective(
    folder: Path, first: Path, tensors: Mapping[str, Tensor], *, of_images: bool
) -> tuple[str, dict[str, tuple[str | None, str]]]:
    """The objective that fits, and its settings: name → (value, comment); ``None`` if only the user knows the value."""
    base = folder if folder.is_dir() else folder.parent
    around = (first, first.parent, base, base.parent)
    adapter = next((place for place in around if _adapts_transformers(place)), None)
    language = next((place for place in around if _known(place, "config.json", "model_type")), None)
    if adapter is not None or language is not None:
        return _SCORE, _of_adapter(adapter) if adapter is not None else _of_score(language)
    of_lora = lora_flavour(tensors) is not None
    places = [inside for place in around for inside in (place / "unet", place)]
    model = next((place for place in places if _class_of(place) is not None), None)
    if of_lora or (model is not None and _class_of(model) == "UNet2DConditionModel"):
        known = (json.dumps(str(model.parent)), "where the rest of the pipeline is") if model and not of_lora else None
        return "latent_diffusion.py", {
            "component": ("lora" if of_lora else "unet", "what they are"),
            "pipeline": known or (None, "the folder of the pipeline that the LoRA is for, or its name at the hub"),
            "prompts": (None, "a text file, one prompt a line"),
            "sampler": ("{steps: 20}", "the pipeline's own scheduler; {name: lcm, steps: 4} takes another"),
        }
    if model is not None:
        return "diffusers_unconditional.py", {
            "model": (json.dumps(str(model)), "its config.json; weights come from the checkpoints"),
            "sampler": ("{name: dpm-solver++, steps: 10}", "ddim, heun, consistency, ...: docs/formats.md"),
        }
    with contextlib.suppress(TrajectoryError):
        if first.suffix == ".pkl" and read_init_arguments(first):
            return "edm.py", {
                "network": (None, "the class of the network, as training.networks:EDMPrecond"),
                "sampler": ("{name: heun, steps: 18}", "EDM's own"),
            }
    if not of_images and not _makes_images(tensors):
        return _SCORE, _of_score(None)
    return "torch_module.py", {
        "model": (None, "module:function that makes your network"),
        "sampler": (None, "module:function that is called as sample(model, noise) and returns images in [-1, 1]"),
        "image_shape": (None, "of the noise of one image, as [3, 32, 32]"),
    }


def _of_score(model: Path | None) -> dict[str, tuple[str | None, str]]:
    known = None if model is None else json.dumps(str(model))
    what = "its config.json; weights come from the checkpoints" if known else "module:function that makes your network"
    return {
        "model": (known, what),
        "score": (None, "module:function, called as score(model, draw); gives losses of single items, docs/score.md"),
        "size": ("500", "items of an evaluation; leave it out where the score takes no draw"),
    }


def _of_adapter(adapter: Path) -> dict[str, tuple[str | None, str]]:
    base = _known(adapter, "adapter_config.json", "base_model_name_or_path") or "BASE"
    example = f"lm_eval --model hf --model_args pretrained={base},peft={{model}} --tasks arc_easy --output_path {{out}}"
    return {
        "model": (json.dumps(str(adapter)), "the adapter's configuration"),
        "command": (None, f"scores the adapter in {{model}}, such as {example}"),
        "read": (None, "where in the JSON of the command its number is, such as results.arc_easy.acc"),
        "maximize": ("true", "whether higher is better"),
    }


def _makes_images(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a network is told a noise level, or ends in few channels; also where nothing tells."""
    matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1]
    few = any(tensor.ndim > 2 and len(tensor) <= 4 for tensor in matrices)  # of RGB, or of latents
    return few or not matrices or any(_NOISE_LEVEL.search(name) for name in tensors)


def _adapts_transformers(folder: Path) -> bool:
    """Whether an adapter is of a model of transformers; peft names its task, or its library where no task was given."""
    library = _known(folder, "adapter_config.json", "auto_mapping", "parent_library") or ""
    return library.startswith("transformers.") or bool(_known(folder, "adapter_config.json", "task_type"))


def _known(folder: Path, file: str, *keys: str) -> str | None:
    """A text in a JSON file of a folder; ``None`` where it is not."""
    try:
        found = json.loads((folder / file).read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) and found else None


def _class_of(model: Path) -> str | None:
    """The class of a diffusers model in its ``config.json``."""
    found = _known(model, "config.json", "_class_name") or ""
    return found if re.fullmatch(r"UNet\w+|\w+Transformer\w*", found) else None


def _images_near(folder: Path) -> str | None:
    """The only folder with images next to the checkpoints or in the working directory."""
    base = folder if folder.is_dir() else folder.parent
    near = {path for place in (base.parent, Path()) if place.is_dir() for path in place.iterdir() if path.is_dir()}
    found = [path for path in sorted(near) if sum(ImageSet.is_image(file.name) for file in path.iterdir()) >= 2]
    return str(found[0]) if len({path.resolve() for path in found}) == 1 else None
