"""The rate of arithmetic that counts as MFU 1: a card's published one, or, where that is not known, a measured one."""

from __future__ import annotations

import functools
import re
import time

import torch

# Dense matrix products in bf16, or fp16 on Turing, with sums in fp32, in FLOP/s, from the vendor's data sheets and
# white papers; boards of other power or form, such as laptops', and parts of a card have other rates and are measured.
PUBLISHED = {
    r"NVIDIA H200": 989e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"(NVIDIA )?A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe": 312e12,
    r"(NVIDIA )?GeForce RTX 5090": 209.5e12,
    r"(NVIDIA )?GeForce RTX 4090": 165.2e12,
    r"(NVIDIA )?GeForce RTX 3090": 71e12,
    r"(NVIDIA )?GeForce RTX 2070": 29.9e12,
}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s, "published" or "measured") of matrix products in `dtype`."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for pattern, rate in PUBLISHED.items():
            if re.fullmatch(pattern, name):
                return rate, "published"
    return _measured(device, dtype), "measured"


def _measured(device: torch.device, dtype: torch.dtype, samples: int = 5) -> float:
    size = 8192 if device.type == "cuda" else 512
    with torch.random.fork_rng(devices=[]):
        a = torch.randn(size, size).to(device, dtype)
    (a @ a).sum().item()
    best = float("inf")
    for _ in range(samples):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
