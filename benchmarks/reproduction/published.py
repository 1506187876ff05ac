"""The paper's numbers (Liu et al. 2024, first version), its claims, and the study file that tests each."""

from __future__ import annotations

from reproduction.quality import QUALITY
from reproduction.table import Claim, Setting, Table

CM, DM, COLOUR = {"checkpoints": 0}, {"checkpoints": 1}, {"checkpoints": 2}
CD_250K = 4.08  # EMA at 250K iterations, Table 11; the paper has no EMA* there

TABLES = (
    *QUALITY,
    Table(
        "samples",
        "Table 4: number of samples",
        "10K, 5K and 2K images are 500, 250 and 100 here. The paper has no EMA of a DM at 250K iterations.",
        (
            Setting("CM, 10K", {**CM, "images": 2}, 2.76, CD_250K),
            Setting("CM, 5K", {**CM, "images": 1}, 2.79, CD_250K),
            Setting("CM, 2K", {**CM, "images": 0}, 3.40, CD_250K),
            Setting("DM, 10K", {**DM, "images": 2}, 3.87),
            Setting("DM, 5K", {**DM, "images": 1}, 4.04),
            Setting("DM, 2K", {**DM, "images": 0}, 9.23),
        ),
        (
            Claim("CM: 10K is better than 2K", {**CM, "images": 2}, 2.76 / 3.40, {**CM, "images": 0}),
            Claim("CM: 10K is better than 5K", {**CM, "images": 2}, 2.76 / 2.79, {**CM, "images": 1}),
            Claim("DM: 10K is better than 2K", {**DM, "images": 2}, 3.87 / 9.23, {**DM, "images": 0}),
            Claim("DM: 10K is better than 5K", {**DM, "images": 2}, 3.87 / 4.04, {**DM, "images": 1}),
            Claim("CM: 2K is better than EMA", {**CM, "images": 0}, 3.40 / CD_250K),
        ),
    ),
    Table(
        "iterations",
        "Table 4: search iterations",
        "1K, 2K and 4K iterations are 50, 100 and 200 here. A search along the gradient ends by itself.",
        (
            Setting("CM, 1K", {**CM, "evaluations": 0}, 3.03, CD_250K),
            Setting("CM, 2K", {**CM, "evaluations": 1}, 2.76, CD_250K),
            Setting("CM, 4K", {**CM, "evaluations": 2}, 2.69, CD_250K),
            Setting("DM, 1K", {**DM, "evaluations": 0}, 4.01),
            Setting("DM, 2K", {**DM, "evaluations": 1}, 3.87),
            Setting("DM, 4K", {**DM, "evaluations": 2}, 3.79),
        ),
        (
            Claim("CM: 2K is better than 1K", {**CM, "evaluations": 1}, 2.76 / 3.03, {**CM, "evaluations": 0}),
            Claim("CM: 4K is better than 2K", {**CM, "evaluations": 2}, 2.69 / 2.76, {**CM, "evaluations": 1}),
            Claim("DM: 2K is better than 1K", {**DM, "evaluations": 1}, 3.87 / 4.01, {**DM, "evaluations": 0}),
            Claim("DM: 4K is better than 2K", {**DM, "evaluations": 2}, 3.79 / 3.87, {**DM, "evaluations": 1}),
        ),
    ),
    Table(
        "interval",
        "Table 4 (b): interval between checkpoints",
        "50, 100 and 200 steps (801, 401 and 201 checkpoints) are 20, 40 and 80 here (200, 100 and 50 checkpoints).",
        (
            Setting("CM, 50", {"interval": 0}, 2.71, CD_250K),
            Setting("CM, 100", {"interval": 1}, 2.76, CD_250K),
            Setting("CM, 200", {"interval": 2}, 2.84, CD_250K),
        ),
        (
            Claim("50 steps are better than 100", {"interval": 0}, 2.71 / 2.76, {"interval": 1}),
            Claim("100 steps are better than 200", {"interval": 1}, 2.76 / 2.84, {"interval": 2}),
        ),
    ),
    Table(
        "window",
        "Table 9: window",
        "10K, 40K and 50K steps of 250K are 800, 3,200 and 3,980 of 4,000 here, so ours reach further back.",
        (
            Setting("CM, 10K", {"window": 0}, 2.89, CD_250K),
            Setting("CM, 40K", {"window": 1}, 2.76, CD_250K),
            Setting("CM, 50K", {"window": 2}, 2.73, CD_250K),
        ),
        (
            Claim("40K is better than 10K", {"window": 1}, 2.76 / 2.89, {"window": 0}),
            Claim("50K is better than 40K", {"window": 2}, 2.73 / 2.76, {"window": 1}),
        ),
    ),
    Table(
        "seeds",
        "Table 13: other seeds",
        "The paper has two seeds, 2.76 and 2.69; their mean is shown.",
        (Setting("CM, two seeds", {}, 2.725, CD_250K),),
        (Claim("whatever the seed, LCSC is better than EMA", {}, 2.725 / CD_250K),),
    ),
    Table(
        "convex",
        "Table 14: without and with restriction to the convex hull",
        "The DM's 350K iterations have an EMA of 4.45 (Table 11).",
        (
            Setting("CM, w/o", {**CM, "space": 0}, 2.76, CD_250K),
            Setting("CM, w", {**CM, "space": 1}, 3.38, CD_250K),
            Setting("DM, w/o", {**DM, "space": 0}, 3.56, 4.45),
            Setting("DM, w", {**DM, "space": 1}, 3.59, 4.45),
        ),
        (
            Claim("CM: any sign is better than convex", {**CM, "space": 0}, 2.76 / 3.38, {**CM, "space": 1}),
            Claim("DM: any sign is better than convex", {**DM, "space": 0}, 3.56 / 3.59, {**DM, "space": 1}),
        ),
    ),
    Table(
        "ema",
        "Table 10: against all EMA rates",
        "The paper's CT is LCSC at 400K iterations against the best EMA at 800K; ours are of the same length.",
        (
            Setting("CD (ours: CM of digits)", CM, 2.42, 3.51),
            Setting("DM (ours: DM of digits)", DM, 3.18, 3.96),
            Setting("CT (ours: CM of photographs)", COLOUR, 8.60, 9.69),
        ),
        (
            Claim("CD: LCSC is better than the best EMA rate", CM, 2.42 / 3.51),
            Claim("DM: LCSC is better than the best EMA rate", DM, 3.18 / 3.96),
            Claim("CT: LCSC is better than the best EMA rate", COLOUR, 8.60 / 9.69),
        ),
        beside="features",
    ),
    Table(
        "features",
        "Tables 11 and 12: FID in other features",
        "There FID@CLIP against that of the default EMA rate; here FID in a second network's features against EMA*'s.",
        (
            Setting("CD, 800K (ours: CM of digits)", CM, 14.8, 17.7),
            Setting("DM, 800K (ours: DM of digits)", DM, 36.4, 42.7),
            Setting("CT, 400K (ours: CM of photographs)", COLOUR, 29.5, 43.0),
        ),
        (
            Claim("CD: LCSC is better in other features, too", CM, 14.8 / 17.7, cross_check=True),
            Claim("DM: LCSC is better in other features, too", DM, 36.4 / 42.7, cross_check=True),
            Claim("CT: LCSC is better in other features, too", COLOUR, 29.5 / 43.0, cross_check=True),
        ),
    ),
    Table("keep", "Single images", "Not in the paper: searches that keep precision.", (), ()),
)

NOT_HERE = (
    ("Figure 4", "how much training is left to be had, drawn; its points are those of Tables 1 to 3"),
    ("Table 2, as it is", "ImageNet-64; its rows stand next to those of CIFAR-10, which ours are as near to"),
    ("Figures 3, 6", "the landscape: the optimizer `Landscape` draws it for any experiment; no number is compared"),
    ("Figures 5, 7, 8", "patterns of coefficients: the dashboard's page of a study draws them; no number is compared"),
    ("full scale", "CIFAR-10 and ImageNet-64: no data, no GPU"),
)
