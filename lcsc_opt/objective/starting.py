"""A first study file for a folder of checkpoints. It holds what the folder tells; the rest is marked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.study_file import FILL_IN, experiment_name
from lcsc_opt.checkpoints import read_checkpoint, read_init_arguments
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.checkpoints.lora import lora_flavour
from lcsc_opt.metrics.reference.images import is_image
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.packing import find_sources

REFERENCE = "a folder of real images, an .npz with mu and sigma, or a data set such as cifar10-train"
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
    steps, names, first = _look(folder)
    kind, settings = _objective(folder, names, first)
    if reference is not None:
        settings["reference"] = (reference, "the real images")
    elif (near := _images_near(folder)) is not None:
        settings["reference"] = (str(near), "the real images; found here")
    else:
        settings["reference"] = (None, REFERENCE)
    missing, lines = [], []
    for name, (known, comment) in settings.items():
        value = known if known is not None else ask(name, comment)
        if value is None:
            missing.append(f"objective.settings.{name}")
        shown = json.dumps(f"{FILL_IN}: {comment}") if value is None else value
        lines.append(f"    {name}: {shown}".ljust(50) + ("" if value is None else f"  # {comment}"))
    found = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}, for objectives/{kind}"
    search = (
        "  - LCSCGradient     # follows the gradient of FID; take LCSCQuadratic where loss or sampler have none"
        if lora_flavour(names) is None
        else "  - LCSCQuadratic    # needs only losses; a LoRA in a pipeline has no gradient"
    )
    return _text(folder, kind, lines, found, search), found, missing


def _look(folder: Path) -> tuple[tuple[int, ...], tuple[str, ...], Path]:
    """Training steps, names of tensors, and the first checkpoint."""
    if is_packed(folder):
        trajectory = Trajectory.open(folder)
        return trajectory.steps, trajectory.names, folder
    sources = find_sources(find_checkpoints(folder))
    first = next(iter(sources.values()))
    return tuple(sources), tuple(read_checkpoint(first).tensors), first


def _objective(folder: Path, names: tuple[str, ...], first: Path) -> tuple[str, dict[str, tuple[str | None, str]]]:
    """The objective that fits, and its settings: name → (value, comment); ``None`` if only the user knows the value."""
    checkpoints: dict[str, tuple[str | None, str]] = {
        "checkpoints": (json.dumps(str(folder)), "a folder, a glob, or a packed trajectory")
    }
    prompts = {
        "prompts": (None, "a text file, one prompt a line"),
        "sampler": ("{steps: 20}", "the pipeline's own scheduler; {name: lcm, steps: 4} takes another"),
    }
    if lora_flavour(names) is not None:
        pipeline = {"pipeline": (None, "the folder of the pipeline that the LoRA is for, or its name at the hub")}
        return "latent_diffusion.py", {**checkpoints, "component": ("lora", "what they are"), **pipeline, **prompts}
    model = _model_near(folder, first)
    if model is not None and _class_of(model) == "UNet2DConditionModel":
        whole = {"pipeline": (json.dumps(str(model.parent)), "where the rest of the pipeline is")}
        return "latent_diffusion.py", {**checkpoints, "component": ("unet", "what they are"), **whole, **prompts}
    if model is not None:
        sampler = ("{name: dpm-solver++, steps: 10}", "ddim, heun, consistency, ...: docs/formats.md")
        config = (json.dumps(str(model)), "its config.json; weights come from the checkpoints")
        return "diffusers_unconditional.py", {**checkpoints, "model": config, "sampler": sampler}
    if _is_edm(first):
        network = (None, "the class of the network, as training.networks:EDMPrecond")
        return "edm.py", {**checkpoints, "network": network, "sampler": ("{name: heun, steps: 18}", "EDM's own")}
    own = {
        "model": (None, "module:function that makes your network"),
        "sampler": (None, "module:function that is called as sample(model, noise) and returns images in [-1, 1]"),
        "image_shape": (None, "of the noise of one image, as [3, 32, 32]"),
    }
    return "torch_module.py", {**checkpoints, **own}


def _model_near(folder: Path, first: Path) -> Path | None:
    """A folder with the configuration of a diffusers model: in the first checkpoint, or next to the checkpoints."""
    base = folder if folder.is_dir() else folder.parent
    places = [first, first.parent, base, base.parent]
    for place in places:
        for inside in (place / "unet", place):
            if _class_of(inside) is not None:
                return inside
    return None


def _class_of(model: Path) -> str | None:
    try:
        found = json.loads((model / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) and re.fullmatch(r"UNet\w+|\w+Transformer\w*", found) else None


def _is_edm(first: Path) -> bool:
    if first.suffix != ".pkl":
        return False
    try:
        return bool(read_init_arguments(first))
    except TrajectoryError:
        return False


def _images_near(folder: Path) -> Path | None:
    """The only folder with images next to the checkpoints or in the working directory."""
    base = folder if folder.is_dir() else folder.parent
    near = {path for place in (base.parent, Path()) if place.is_dir() for path in place.iterdir() if path.is_dir()}
    found = [path for path in sorted(near) if sum(is_image(file.name) for file in path.iterdir()) >= 2]
    return found[0] if len({path.resolve() for path in found}) == 1 else None


def _text(folder: Path, kind: str, settings: list[str], found: str, search: str) -> str:
    return "\n".join(
        [
            f"# {found}. lcsc run FILE --dry-run says what is still to be filled in.",
            f"name: {json.dumps(experiment_name(folder.resolve().name) or 'study', ensure_ascii=False)}",
            "objective:",
            f"  file: {kind}",
            "  settings:",
            *settings,
            "    images: 2000".ljust(50) + "  # an evaluation samples so many; the paper takes 10,000",
            "optimizers:",
            "  - EMAGrid          # the best plain average of the checkpoints, to compare with",
            search,
            "seeds: [0]",
            "budget: {evaluations: 300}",
            "storage: sqlite:///studies.db",
            "held_out: {images: 10000, top: 5}   # the answer is chosen and reported on other noise",
            "",
        ]
    )
