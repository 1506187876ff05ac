"""What a trial of the paper's size should take on a GPU: bytes and FLOPs over a device's bandwidth and rates.

    python benchmarks/expected.py [--bandwidth 3350] [--host 55] [--tf32 495] [--bf16 990] [--fp64 34] [--share 0.4]

GB/s of the device's memory and from the host's pinned memory, TFLOP/s; those of an H100 SXM by default. Convolutions
are assumed to reach ``share`` of the rate; those of float32 are in TF32 there, which is torch's default. The networks
are those of ``cifar.py`` and InceptionV3; the first one's FLOPs are counted by torch on its meta device.
"""

from __future__ import annotations

import argparse

import torch
from cifar import IMAGE_SHAPE, network
from torch.utils.flop_counter import FlopCounterMode

CHECKPOINTS, IMAGES, FEATURES = 200, 10_000, 2048
INCEPTION_FLOPS = (
    2 * 5.7e9
)  # of one image of 299×299 (Szegedy et al. 2016, Section 6: 5 billion multiply-adds and more)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("bandwidth", 3350), ("host", 55), ("tf32", 495), ("bf16", 990), ("fp64", 34), ("share", 0.4)):
        parser.add_argument(f"--{name}", type=float, default=value)
    known = parser.parse_args()
    weights, flops = counted()
    row_bytes = CHECKPOINTS * weights * 2  # float16
    moments, features = 2 * IMAGES * FEATURES**2 / 2, 8 * FEATURES * (FEATURES + 1)
    memory, rate = 1e9 * known.bandwidth, 1e12 * known.share
    rows = {
        "merge, resident": ("memory: rows once, in float32 written and read", 5 * row_bytes / memory),
        "merge, streamed": ("the host's memory to the device", row_bytes / (1e9 * known.host)),
        "sample, one call, `fp32`": ("arithmetic", IMAGES * flops / (rate * known.tf32)),
        "sample, one call, `bf16`": ("arithmetic", IMAGES * flops / (rate * known.bf16)),
        "features, `fp32`": ("arithmetic", IMAGES * INCEPTION_FLOPS / (rate * known.tf32)),
        "moments": ("arithmetic in float64", moments / (rate * known.fp64)),
        "moments to the host": ("the bus", features / (1e9 * known.host)),
    }
    size = f"{CHECKPOINTS} rows of {weights * 2e-9:.3f} GB"
    print(f"{weights / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOP a call, {size}")
    for part, (bound, seconds) in rows.items():
        print(f"| {part} | {seconds:.4f} s | {bound} |")


def counted() -> tuple[int, float]:
    """Parameters, and FLOPs of one call for one image."""
    with torch.device("meta"):
        model = network(quick=False)
        images, times = torch.empty(1, *IMAGE_SHAPE), torch.empty(1)
    with FlopCounterMode(display=False) as counter:
        model(images, times)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


if __name__ == "__main__":
    main()
