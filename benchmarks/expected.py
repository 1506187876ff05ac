"""What a trial of the paper's size should take on a GPU: bytes and FLOPs over a device's bandwidth and rates.

    python benchmarks/expected.py [--bandwidth 3350] [--host 55] [--tf32 495] [--bf16 990] [--fp64 34] [--share 0.4]
    python benchmarks/expected.py --edm2 CLONE    # the searches of studies/edm2, by the class in a clone of NVlabs/edm2

GB/s of the device's memory and from the host's pinned memory, TFLOP/s; those of an H100 SXM by default. Convolutions
are assumed to reach ``share`` of the rate; those of float32 are in TF32 there, which is torch's default. The networks
are those of ``cifar.py``, whose FLOPs torch counts, and InceptionV3. EDM2's networks sample in fp16, at the rate of
bf16, and its autoencoder decodes in TF32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cifar import IMAGE_SHAPE, network
from common import markdown, parse
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

H100: dict[str, Any] = {"bandwidth": 3350.0, "host": 55.0, "tf32": 495.0, "bf16": 990.0, "fp64": 34.0, "share": 0.4}
FEATURES, CPU_SECONDS = 2048, 0.37  # the latter of fid.py, on two cores
INCEPTION_FLOPS = 11.4e9  # of an image of 299×299 (Szegedy et al. 2016, Section 6: 5 billion multiply-adds and more)


# Of NVlabs' train_edm2.py: size → channels of the network, and the Mi (2^20) images that it was trained on.
EDM2_SIZES = {
    "img512": {
        "xs": (128, 2048),
        "s": (192, 2048),
        "m": (256, 2048),
        "l": (320, 1792),
        "xl": (384, 1280),
        "xxl": (448, 896),
    },
    "img64": {"s": (192, 1024), "m": (256, 2048), "l": (320, 1024), "xl": (384, 640)},
}
PASSES_OF_SAMPLER = 4  # of a gradient: forward, forward with a graph, and backward, which costs two
PASSES_OF_FEATURES = 3  # the same, but backward costs one, since Inception's weights need no gradient
EDM2_EVERY = 64  # Mi images between two raw snapshots of one width
EDM2_CALLS = 63  # of an image: 32 steps of Heun's method
EDM2_IMAGES = 10_000
EDM2_BUDGET = 1_000_000
EDM2_HELD_OUT = 50_000
EDM2_REPORTED = 16  # six finalists, the last checkpoint, three points and the yardstick; then five models once more


def main() -> None:
    """Print the table."""
    arguments = parse(
        __doc__, **H100, edm2={"default": "", "help": "a clone of NVlabs/edm2, for the searches of its sizes"}
    )
    if arguments.edm2:
        print(*markdown(edm2_rows(arguments.edm2, vars(arguments))), sep="\n")
        return
    rows = expected(200, 10_000, vars(arguments))
    print(
        *markdown([("what", "seconds", "bound by"), *((n, f"{s:.3f}", why) for n, (s, why) in rows.items())]), sep="\n"
    )


def edm2_rows(clone: str, of: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The searches of ``studies/edm2``: a row for each released size."""
    sys.path.insert(0, clone)
    from training.networks_edm2 import Precond  # type: ignore[import-not-found]

    decoder_flops = _decoder_flops()
    rate = 1e12 * of["share"]
    heads = ("model", "parameters", "files", "rows in fp16", "TFLOP an image", "merge", "trial", "search and report")
    rows: list[tuple[str, ...]] = [heads]
    for data, sizes in EDM2_SIZES.items():
        for size, (channels, duration) in sizes.items():
            parameters, call = _edm2_counted(Precond, channels, latents=data == "img512")
            files = duration // EDM2_EVERY
            row_bytes = 2 * files * parameters
            decoding = decoder_flops if data == "img512" else 0.0
            seconds = EDM2_CALLS * call / (rate * of["bf16"]) + (decoding + INCEPTION_FLOPS) / (rate * of["tf32"])
            merge = row_bytes / (1e9 * of["host"])
            trial = EDM2_IMAGES * seconds + merge
            merges = EDM2_BUDGET / EDM2_IMAGES
            total = (EDM2_BUDGET + EDM2_HELD_OUT * EDM2_REPORTED) * seconds + merges * merge
            work = (EDM2_CALLS * call + decoding) / 1e12
            numbers = (f"{parameters / 1e6:.0f} M", str(files), f"{row_bytes / 1e9:.0f} GB", f"{work:.2f}")
            rows.append(
                (f"{data} {size.upper()}", *numbers, f"{merge:.1f} s", f"{trial:.0f} s", f"{total / 3600:.0f} h")
            )
    return rows


def _edm2_counted(build: Callable[..., nn.Module], channels: int, *, latents: bool) -> tuple[int, float]:
    """Parameters, and FLOPs of one call for one image, of a network of EDM2."""
    shape = (1, 4 if latents else 3, 64, 64)
    with torch.device("meta"):
        model = build(64, shape[1], 1000, model_channels=channels).eval()
        inputs = (torch.empty(shape), torch.empty(1), torch.empty(1, 1000))
    return parameters_and_flops(model, *inputs)


def _decoder_flops() -> float:
    """FLOPs of Stability's autoencoder for an image of 512×512."""
    from lcsc_opt.base.imports import import_extra

    import_extra("transformers")  # which diffusers' models may import
    channels = (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        model = import_extra("diffusers").AutoencoderKL(block_out_channels=channels, layers_per_block=2, **blocks)
        latents = torch.empty(1, 4, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model.decode(latents)
    return float(counter.get_total_flops())


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
        "trial with its gradient": (
            PASSES_OF_SAMPLER * sample + PASSES_OF_FEATURES * features,
            "arithmetic: forward, and again with backward",
        ),
    }


def counted(*, quick: bool) -> tuple[int, float]:
    """Parameters, and FLOPs of one call for one image."""
    with torch.device("meta"):
        model = network(quick=quick)
        images, times = torch.empty(1, *IMAGE_SHAPE), torch.empty(1)
    return parameters_and_flops(model, images, times)


def parameters_and_flops(model: nn.Module, *inputs: torch.Tensor) -> tuple[int, float]:
    """Parameters, and FLOPs of one call."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


if __name__ == "__main__":
    main()
