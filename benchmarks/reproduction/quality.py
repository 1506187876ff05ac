"""Tables 1, 2, 3, 7 and 8 of the paper: less training, smaller batches, fewer steps of sampling; and Tables 5 and 6."""

from __future__ import annotations

from reproduction.table import Claim, Setting, Table

Judges = dict[str, tuple[float, float]]


def _at(checkpoints: int, step: int, nfe: int | None = None) -> dict[str, int]:
    """A point of ``cd.yaml`` or ``ct.yaml``."""
    return {"checkpoints": checkpoints, "last_step": step, **({} if nfe is None else {"nfe": nfe})}


def _judges(lcsc: tuple[float, float, float], ema: tuple[float, float, float]) -> Judges:
    """IS, precision and recall."""
    return dict(zip(("is", "precision", "recall"), zip(lcsc, ema, strict=True), strict=True))


NAMES = {"is": "IS", "precision": "precision", "recall": "recall"}
CD, CT, DM = 3.51, 9.70, 3.96  # EMA* at the end of the standard training
CD_TWO_STEPS = 2.90  # EMA; the paper has no EMA* in two steps
CD_END, CD_TWO, CD_PART = _at(0, 1, 0), _at(0, 1, 1), _at(0, 0, 0)
CD_SMALL, CD_SMALL_PART = _at(1, 1, 0), _at(1, 0, 0)
CT_END, CT_PART, CT_SMALL, CT_SMALL_PART = _at(0, 1), _at(0, 0), _at(1, 1), _at(1, 0)
CD_JUDGES = _judges((9.76, 0.67, 0.60), (9.37, 0.68, 0.57))
CT_JUDGES = _judges((8.98, 0.70, 0.45), (8.81, 0.69, 0.42))
CD_64_PART = _judges((41.8, 0.68, 0.62), (37.0, 0.67, 0.62))
CD_64_END = _judges((40.9, 0.68, 0.62), (37.7, 0.67, 0.62))
CD_PART_JUDGES = _judges((9.60, 0.67, 0.58), (9.13, 0.67, 0.55))
CT_64_PART = _judges((35.1, 0.67, 0.54), (30.6, 0.62, 0.54))
CT_64_END = _judges((35.7, 0.65, 0.57), (31.2, 0.64, 0.55))
CT_PART_JUDGES = _judges((8.89, 0.67, 0.47), (8.52, 0.67, 0.43))
DM_JUDGES = _judges((9.59, 0.64, 0.61), (9.50, 0.64, 0.60))
PART = "LCSC after a part of the training is better than EMA* after all of it"
SMALL = "LCSC with a smaller batch is better than EMA* with the full one"


def _higher(model: str, judge: str, of: Judges, where: dict[str, int]) -> Claim:
    lcsc, ema = of[judge]
    return Claim(f"{model}: {NAMES[judge]} is higher than that of EMA*", where, ema / lcsc, judge=judge)


QUALITY = (
    Table(
        "cd",
        "Tables 1, 2, 7 and 8: consistency distillation",
        "800K iterations of batches of 512 are 1,000 of 128 here; a part of them, 50K there, is 250; a batch of 128, "
        "there for 100K iterations, is one of 32 for all of them. The rows of ImageNet-64 have batches of 256 "
        "in place of 2,048, and ours of 32.",
        (
            Setting("ImageNet-64, 300K of 600K", CD_SMALL_PART, 5.71, 7.70, CD_64_PART, 15.27),
            Setting("ImageNet-64, 600K + 20K", CD_SMALL, 5.54, 7.17, CD_64_END, 7.55),
            Setting("800K", CD_END, 2.42, CD, CD_JUDGES),
            Setting("800K, NFE 2", CD_TWO, None, CD_TWO_STEPS),
            Setting("50K", CD_PART, 3.18, 4.84, CD_PART_JUDGES, 14.27),
            Setting("batch of 128", CD_SMALL, 3.34, speed_up=25.55),
        ),
        (
            Claim("CD: LCSC is better than EMA*", CD_END, 2.42 / CD),
            Claim(f"CD: {PART}", CD_PART, 3.18 / CD, CD_END, of_ema=True),
            Claim(f"CD: {SMALL}", CD_SMALL, 3.34 / CD, CD_END, of_ema=True),
            Claim("CD: LCSC in one step is better than EMA* in two", CD_END, 2.42 / CD_TWO_STEPS, CD_TWO, of_ema=True),
            _higher("CD", "is", CD_JUDGES, CD_END),
            _higher("CD", "recall", CD_JUDGES, CD_END),
        ),
        seeds=3,
        standard=CD_END,
    ),
    Table(
        "ct",
        "Tables 1, 2, 7 and 8: consistency training",
        "800K iterations of batches of 512 are 2,000 of 128 here; a part of them, 400K there, is 1,000; a batch of "
        "128, there for 450K iterations, is one of 32 for all of them. The rows of ImageNet-64 have batches of "
        "256 in place of 2,048, and ours of 32.",
        (
            Setting("ImageNet-64, 600K of 800K", CT_SMALL_PART, 12.1, 16.6, CT_64_PART, 10.33),
            Setting("ImageNet-64, 1000K", CT_SMALL, 11.1, 15.6, CT_64_END, 6.27),
            Setting("800K + 40K", CT_END, 8.05, CT, CT_JUDGES),
            Setting("400K", CT_PART, 8.60, 12.1, CT_PART_JUDGES, 1.96),
            Setting("batch of 128", CT_SMALL, 8.33, speed_up=6.64),
        ),
        (
            Claim("CT: LCSC is better than EMA*", CT_END, 8.05 / CT),
            Claim(f"CT: {PART}", CT_PART, 8.60 / CT, CT_END, of_ema=True),
            Claim(f"CT: {SMALL}", CT_SMALL, 8.33 / CT, CT_END, of_ema=True),
            _higher("CT", "is", CT_JUDGES, CT_END),
            _higher("CT", "recall", CT_JUDGES, CT_END),
        ),
        seeds=3,
        standard=CT_END,
    ),
    Table(
        "dm",
        "Table 3: a diffusion model in fewer steps",
        "NFE 15, 12 and 9 are 10, 8 and 6 here. On CIFAR-10 NFE 9 is on a par with EMA* at 15: 3.97 and 3.96.",
        (
            Setting("NFE 15", {"nfe": 0}, 3.18, DM, DM_JUDGES),
            Setting("NFE 12", {"nfe": 1}, 3.36),
            Setting("NFE 9", {"nfe": 2}, 3.97),
        ),
        (
            Claim("DM: LCSC is better than EMA*", {"nfe": 0}, 3.18 / DM),
            Claim("DM: LCSC at NFE 12 is better than EMA* at 15", {"nfe": 1}, 3.36 / DM, {"nfe": 0}, of_ema=True),
            _higher("DM", "is", DM_JUDGES, {"nfe": 0}),
            _higher("DM", "recall", DM_JUDGES, {"nfe": 0}),
        ),
        seeds=3,
        standard={"nfe": 0},
        fewest="nfe",
    ),
)

STAGES = (  # Table 5: seconds of an evaluation of 10,000 images (5,000 of the DM of ImageNet-64)
    ("paper's CM, CIFAR-10", "10,000", "5.57", "7.34", "4.28", "2.49"),
    ("paper's CM, ImageNet-64", "10,000", "12.0", "34.7", "4.32", "2.37"),
    ("paper's DM, CIFAR-10", "10,000", "4.61", "40.9", "4.39", "2.49"),
    ("paper's DM, ImageNet-64", "5,000", "13.8", "114.5", "2.24", "2.53"),
)
HOURS = {"cd": (6.45, 818), "ct": (6.45, 640), "dm": (25.2, 29.3)}
"""Table 6, CIFAR-10: (hours of a search, hours of the training)."""
