"""One line of advice on a profile: rules, from the part that takes most to the one that takes least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lcsc_opt.base.spans import DATABASE, EVALUATE, FEATURES, MERGE, METRIC, SAMPLE
from lcsc_opt.diagnostics.profiling.parts import OPTIMIZER, Part, Profile

WORTH = 0.15  # of a trial's time; a part that takes less gets no advice
NEAR = 0.6  # of its limit; a part that reaches more is as fast as can be expected
EXACT = "exact"


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """What can be changed.

    Attributes:
        settings: the objective's settings of sampling, with their values: some of batch_size, channels_last, compile,
            dtype and images.
        stored: how the trajectory is stored: ``exact``, or the dtype of its differences; ``None`` where there is none.
        workers: of the study.
        places: how many workers this machine has room for: GPUs, or cores where there is none.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stored: str | None = None
    workers: int = 1
    places: int = 1


def advice(profile: Profile, circumstances: Circumstances) -> str:
    """The first rule that has something to say, beginning with the part that takes most."""
    for part in sorted(profile.parts, key=lambda part: part.share, reverse=True):
        if part.share < WORTH:
            break
        text = RULES.get(part.name, _nothing)(part, profile, circumstances)
        if text is not None:
            return text
    most = max(profile.parts, key=lambda part: part.share)
    return f"{_takes(most)}, and nothing here would make it much faster; fewer evaluations or another machine would"


def _takes(part: Part) -> str:
    names = {MERGE: "merging", SAMPLE: "sampling", METRIC: "the metric", DATABASE: "the database"}
    reached = "" if part.reached is None else f" and reaches {part.reached:.0%} of what this machine can do"
    verb = "take" if part.name == FEATURES else "takes"
    name = {OPTIMIZER: "the optimizer", EVALUATE: "the function", **names}.get(part.name, part.name)
    return f"{name} {verb} {part.share:.0%} of the time{reached}"


def _sample(part: Part, profile: Profile, circumstances: Circumstances) -> str | None:
    known, on_gpu = circumstances.settings, profile.device.startswith("cuda")
    reached = 0.0 if part.reached is None else part.reached
    untried = []
    if reached < NEAR and isinstance(known.get("batch_size"), int):
        untried.append("batch_size: auto" if _takes_auto(known) else "another batch_size")
    if on_gpu and known.get("dtype") == "fp32":
        untried.append("dtype: bf16")
    if reached < NEAR and known.get("channels_last") is False:
        untried.append("channels_last: true")
    if reached < NEAR and known.get("compile") is False:
        untried.append("compile: reduce-overhead" if on_gpu else "compile: true")
    if not untried:
        return _more_workers(part, circumstances)
    room = reached < NEAR and circumstances.places > circumstances.workers
    workers = f"; workers: {circumstances.places} may help as well" if room else ""
    return f"{_takes(part)}: try {', '.join(untried)}; lcsc profile --settings measures what each brings{workers}"


def _takes_auto(known: Mapping[str, Any]) -> bool:
    """Objectives that have the settings of all models have ``auto``, too; the demos' batch size is a number."""
    return "dtype" in known


def _more_workers(part: Part, circumstances: Circumstances) -> str | None:
    if circumstances.places <= circumstances.workers:
        return None
    return f"{_takes(part)}: set workers: {circumstances.places}, as many as this machine has room for"


def _merge(part: Part, _profile: Profile, circumstances: Circumstances) -> str | None:
    if part.reached is not None and part.reached < NEAR:
        return (
            f"{_takes(part)}: memory is faster, so the processor or other programs limit it; give it more threads, "
            "or combine fewer checkpoints (select: interval)"
        )
    if circumstances.stored == EXACT:
        return f"{_takes(part)}: pack the checkpoints with --dtype float16, which halves what is read"
    return f"{_takes(part)}: combine fewer checkpoints (select: interval), or pack them with --dtype int8"


def _features(part: Part, _profile: Profile, circumstances: Circumstances) -> str | None:
    if "images" in circumstances.settings:
        images = circumstances.settings["images"]
        return f"{_takes(part)}: evaluate fewer images (now {images:,}), or take an extractor that is smaller"
    return _more_workers(part, circumstances)


def _metric(part: Part, _profile: Profile, _circumstances: Circumstances) -> str | None:
    return f"{_takes(part)}: leave out metrics that decide nothing, or evaluate fewer images"


def _database(part: Part, _profile: Profile, _circumstances: Circumstances) -> str | None:
    return f"{_takes(part)}: an evaluation is hardly longer than a transaction; keep the database on a local disk"


def _optimizer(part: Part, _profile: Profile, _circumstances: Circumstances) -> str | None:
    return f"{_takes(part)}: search fewer directions (space: {{principal: 40}}), or take LCSC, whose asks cost nothing"


def _evaluate(part: Part, _profile: Profile, circumstances: Circumstances) -> str | None:
    return _more_workers(part, circumstances)


def _nothing(_part: Part, _profile: Profile, _circumstances: Circumstances) -> str | None:
    return None


RULES: Mapping[str, Callable[[Part, Profile, Circumstances], str | None]] = {
    SAMPLE: _sample,
    FEATURES: _features,
    MERGE: _merge,
    METRIC: _metric,
    DATABASE: _database,
    OPTIMIZER: _optimizer,
    EVALUATE: _evaluate,
}
