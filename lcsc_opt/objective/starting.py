"""A first study file for a folder of checkpoints. It holds what the folder tells; the rest is marked."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.study_file import FILL_IN, experiment_name
from lcsc_opt.checkpoints import read_checkpoint, read_init_arguments
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.checkpoints.lora import lora_flavour
from lcsc_opt.metrics.reference.images import ImageSet
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.packing import find_sources

REFERENCE = "a folder of real images, an .npz with mu and sigma, or a data set such as cifar10-train"
_FLUX = ("double_blocks", "single_blocks", "single_transformer_blocks")  # in names of its layers, and of none in SD
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
        TrajectoryError: there are no checkpoints, those of several models, or LoRAs that no objective samples.
    """
    if is_packed(folder):
        trajectory = Trajectory.open(folder)
        steps, names, first = trajectory.steps, trajectory.names, folder
    else:
        sources = find_sources(find_checkpoints(folder))
        first = next(iter(sources.values()))
        steps, names = tuple(sources), tuple(read_checkpoint(first).tensors)
    of_lora = lora_flavour(names) is not None
    if of_lora and any(part in name for name in names for part in _FLUX):
        raise TrajectoryError(f"{folder}: LoRAs of FLUX, which no objective samples; lcsc apply averages them")
    kind, settings = _objective(folder, first, of_lora=of_lora)
    near = _images_near(folder) if reference is None else reference
    settings = {
        "checkpoints": (json.dumps(str(folder)), "a folder, a glob, or a packed trajectory"),
        **settings,
        "reference": (near, REFERENCE if near is None else "the real images"),
    }
    if near is None or not near.strip('"').endswith(".npz"):  # statistics know no single images
        settings["keep"] = ("precision", "stays where the best average has it; not with a file of statistics")
    missing, lines = [], []
    for name, (known, comment) in settings.items():
        value = known if known is not None else ask(name, comment)
        if value is None:
            missing.append(f"objective.settings.{name}")
        shown = json.dumps(f"{FILL_IN}: {comment}") if value is None else value
        lines.append(f"    {name}: {shown}".ljust(50) + ("" if value is None else f"  # {comment}"))
    found = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}, for objectives/{kind}"
    name = json.dumps(experiment_name(folder.resolve().name.removesuffix(".trajectory")) or "study", ensure_ascii=False)
    return _TEXT.format(found=found, name=name, kind=kind, settings="\n".join(lines)), found, missing


_TEXT = """\
# {found}. lcsc run FILE --dry-run says what is still to be filled in.
name: {name}
objective:
  file: {kind}
  settings:
{settings}
    images: 2000                                    # an evaluation samples so many; the paper takes 10,000
space: {{rows: layers}}   # coefficients for each layer; with fewer than ten real images a feature: affine
optimizers:
  - EMAGrid          # the best plain average of the checkpoints, to compare with
  - LCSCGradient     # follows the gradient of FID; take LCSCQuadratic where loss or sampler have none
seeds: [0]
budget: {{evaluations: 300}}
storage: sqlite:///studies.db
held_out: {{images: 10000, top: 5}}   # the answer is chosen and reported on other noise
"""


def _objective(folder: Path, first: Path, *, of_lora: bool) -> tuple[str, dict[str, tuple[str | None, str]]]:
    """The objective that fits, and its settings: name → (value, comment); ``None`` if only the user knows the value."""
    base = folder if folder.is_dir() else folder.parent
    places = [inside for place in (first, first.parent, base, base.parent) for inside in (place / "unet", place)]
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
    return "torch_module.py", {
        "model": (None, "module:function that makes your network"),
        "sampler": (None, "module:function that is called as sample(model, noise) and returns images in [-1, 1]"),
        "image_shape": (None, "of the noise of one image, as [3, 32, 32]"),
    }


def _class_of(model: Path) -> str | None:
    """The class of a diffusers model in its ``config.json``."""
    try:
        found = json.loads((model / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) and re.fullmatch(r"UNet\w+|\w+Transformer\w*", found) else None


def _images_near(folder: Path) -> str | None:
    """The only folder with images next to the checkpoints or in the working directory."""
    base = folder if folder.is_dir() else folder.parent
    near = {path for place in (base.parent, Path()) if place.is_dir() for path in place.iterdir() if path.is_dir()}
    found = [path for path in sorted(near) if sum(ImageSet.is_image(file.name) for file in path.iterdir()) >= 2]
    return str(found[0]) if len({path.resolve() for path in found}) == 1 else None
