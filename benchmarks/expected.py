"""What a trial of the paper's size should take on a GPU: bytes and FLOPs over a device's bandwidth and rates.

    python benchmarks/expected.py [--bandwidth 3350] [--host 55] [--tf32 495] [--bf16 990] [--fp64 34] [--share 0.4]

GB/s of the device's memory and from the host's pinned memory, TFLOP/s; those of an H100 SXM by default. Convolutions
are assumed to reach ``share`` of the rate; those of float32 are in TF32 there, which is torch's default. The networks
are those of ``cifar.py``, whose FLOPs torch counts, and InceptionV3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cifar import IMAGE_SHAPE, network
from common import markdown, parse
from torch.utils.flop_counter import FlopCounterMode

H100: dict[str, Any] = {"bandwidth": 3350.0, "host": 55.0, "tf32": 495.0, "bf16": 990.0, "fp64": 34.0, "share": 0.4}
FEATURES, CPU_SECONDS = 2048, 0.37  # the latter of fid.py, on two cores
INCEPTION_FLOPS = 11.4e9  # of an image of 299×299 (Szegedy et al. 2016, Section 6: 5 billion multiply-adds and more)


def main() -> None:
    """Print the table."""
    rows = expected(200, 10_000, vars(parse(__doc__, **H100)))
    print(
        *markdown([("what", "seconds", "bound by"), *((n, f"{s:.3f}", why) for n, (s, why) in rows.items())]), sep="\n"
    )


def expected(
    checkpoints: int, images: int, of: Mapping[str, float] = H100, *, quick: bool = False
) -> dict[str, tuple[float, str]]:
    """What → its seconds, and what they are bound by; ``quick`` for the small network of ``cifar.py``."""
    weights, flops = counted(quick=quick)
    row_bytes, rate = checkpoints * weights * 2, 1e12 * of["share"]  # float16
    moments, sums = images * FEATURES**2, 8 * FEATURES * (FEATURES + 1)
    sample, features = images * flops / (rate * of["bf16"]), images * INCEPTION_FLOPS / (rate * of["tf32"])
    return {
        "merge, resident": (5 * row_bytes / (1e9 * of["bandwidth"]), "memory: rows once, in float32 written and read"),
        "merge, streamed": (row_bytes / (1e9 * of["host"]), "the bus"),
        "sample, `fp32`": (images * flops / (rate * of["tf32"]), "arithmetic"),
        "sample, `bf16`": (sample, "arithmetic"),
        "features by InceptionV3": (features, "arithmetic"),
        "FID from statistics": (CPU_SECONDS, "the CPU"),
        "FID from features": (moments / (rate * of["fp64"]) + sums / (1e9 * of["host"]) + CPU_SECONDS, "the CPU"),
        "trial": (sample + features, "arithmetic: samples and features; the rest runs meanwhile"),
        "trial with its gradient": (4 * (sample + features), "arithmetic: forward, and again with backward"),
    }


def counted(*, quick: bool) -> tuple[int, float]:
    """Parameters, and FLOPs of one call for one image."""
    with torch.device("meta"):
        model = network(quick=quick)
        images, times = torch.empty(1, *IMAGE_SHAPE), torch.empty(1)
    with FlopCounterMode(display=False) as counter:
        model(images, times)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


if __name__ == "__main__":
    main()
