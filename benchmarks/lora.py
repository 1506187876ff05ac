"""How far merged factors of LoRAs are from merged products: (Σ aᵢBᵢ)(Σ aᵢAᵢ) and Σ aᵢBᵢAᵢ, along random walks.

Takes seconds: OMP_NUM_THREADS=1 python benchmarks/lora.py
"""

from __future__ import annotations

import numpy as np
from common import write_json

from lcsc_opt.coefficients.profiles import ema_coefficients

K, RANK, WIDTH, SEEDS = 50, 8, 320, 5
MOVED = (0.1, 0.3, 1.0)  # how far each factor walks from the first checkpoint to the last, in units of its first norm


def main() -> None:
    """Print and write ‖factors' ΔW − products' ΔW‖ / ‖products' ΔW‖, mean and standard deviation over seeds."""
    apart: dict[str, list[float]] = {}
    for moved, seed in ((moved, seed) for moved in MOVED for seed in range(SEEDS)):
        generator = np.random.default_rng(seed)
        first, walks = generator.standard_normal((2, 1, WIDTH * RANK)), generator.standard_normal((2, K, WIDTH * RANK))
        down, up = (first + moved / K**0.5 * walks.cumsum(axis=1)).reshape(2, K, RANK, WIDTH)
        emas = {rate: ema_coefficients(tuple(range(1, K + 1)), rate) for rate in (0.9, 0.98)}
        noise = generator.standard_normal(K)
        noise = (noise - noise.mean()) / np.abs(noise - noise.mean()).sum()  # sums to 0, its absolute values to 1
        signed = {f"EMA 0.98 and signed noise, {size}": emas[0.98] + size * noise for size in (1, 2, 5)}
        for name, a in {**{f"EMA {rate}": a for rate, a in emas.items()}, **signed}.items():
            products = np.einsum("k,kro,kri->oi", a, up, down, optimize=True)
            factors = np.tensordot(a, up, 1).T @ np.tensordot(a, down, 1)
            away = float(np.linalg.norm(factors - products) / np.linalg.norm(products))
            apart.setdefault(f"walk {moved}, {name}, sum |a|", []).append(float(np.abs(a).sum()))
            apart.setdefault(f"walk {moved}, {name}, apart", []).append(away)
    rows = {name: [round(float(np.mean(v)), 4), round(float(np.std(v, ddof=1)), 4)] for name, v in apart.items()}
    print("\n".join(f"{name:52s} {mean:.4f} ± {spread:.4f}" for name, (mean, spread) in rows.items()))
    print(write_json("lora_products", {"k": K, "rank": RANK, "width": WIDTH, "seeds": SEEDS, "mean_and_spread": rows}))


if __name__ == "__main__":
    main()
