"""Calls every launch path of RMSNorm once, small enough for a run under NVIDIA's compute-sanitizer:

compute-sanitizer --tool memcheck python tests/sanitize_rmsnorm.py      (also racecheck, initcheck)

A line a case, "ok" at the end; the exit status is not 0 if a result is not finite. Memory that the allocator hands out
is NaN beforehand; under initcheck say --no-poison, or nothing would look uninitialized. racecheck takes minutes, and
synccheck has room for so many barriers only (--num-cuda-barriers): share --hidden out among processes.
"""

from __future__ import annotations

import argparse
import itertools
import math

import torch
from torch import Tensor

from tinylm.ops import native

HIDDEN = (1, 7, 8, 64, 100, 256, 1000, 1001, 2048, 4095, 4096, 5120, 8192, 16384, 32768, 50257, 65536, 70000, 300000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6
# Numbers in a case: beyond it there are 2 rows, of the largest sizes.
MOST = 1 << 13


def poison(device: str) -> None:
    """Fills what the caching allocator will hand out: its small pool and its large one."""
    sizes = [1 << power for power in range(9, 20)] * 8 + [1 << 21] * 16
    held = [torch.full((size // 4,), math.nan, device=device) for size in sizes]
    del held


def rows_of(rows: int, hidden: int, dtype: torch.dtype, device: str, aligned: bool, strided: bool) -> Tensor:
    """[rows, hidden], one element into its storage if not aligned; a slice of rows twice as wide if strided."""
    offset, width = 0 if aligned else 1, hidden + (hidden + 8) // 8 * 8 if strided else hidden
    # 8 more: initcheck takes a copy of the first bytes of 16 for one of all.
    memory = torch.empty(offset + rows * width + 8, dtype=dtype, device=device)
    memory.normal_()  # the rest of it too, which a kernel may not read but this script's own copies do
    return memory[offset : offset + rows * width].view(rows, width)[:, :hidden]


def call(
    rows: int, hidden: int, dtype: torch.dtype, wide_weight: bool, aligned: bool, strided: bool, device: str, copy: bool
) -> None:
    library = torch.ops.tinylm
    make = (rows, hidden, dtype, device, aligned, strided)
    x, residual, dy, dsum = (rows_of(*make) for _ in range(4))
    weight_dtype = torch.float32 if wide_weight else dtype
    weight = rows_of(1, hidden, weight_dtype, device, aligned, False).view(hidden)
    results = [library.rmsnorm_inference(x, weight, EPS)]
    y, rstd = library.rmsnorm(x, weight, EPS)
    results += [y, rstd, *library.rmsnorm_backward(dy, x, weight, rstd)]
    results += library.add_rmsnorm_inference(x, residual, weight, EPS)
    y, total, rstd_of_total = library.add_rmsnorm(x, residual, weight, EPS)
    h = rows_of(rows, hidden, dtype, device, True, False).copy_(total)
    results += [y, total, rstd_of_total, *library.add_rmsnorm_backward(dy, dsum, h, weight, rstd_of_total)]
    if copy:  # dy of a .sum(), one number, expanded: the op copies it, and nothing lies behind its last 16 bytes
        results += library.rmsnorm_backward(dy[:1, :1].expand(rows, hidden), x, weight, rstd)
    # One number comes back to the host: under initcheck this also reads every output.
    finite = torch.stack([result.isfinite().all() for result in results]).all()
    assert bool(finite), "a result is not finite"


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--no-poison", action="store_true", help="leave the allocator's memory as it is (initcheck)")
    parse.add_argument("--hidden", type=int, nargs="*", default=HIDDEN)
    parse.add_argument("--many-rows", type=int, default=300, help="rows of the cases of many rows")
    chosen = parse.parse_args()
    native.load()
    torch.manual_seed(0)
    if not chosen.no_poison:
        poison(chosen.device)
    cases = 0

    def run(rows: int, hidden: int, dtype: torch.dtype, wide_weight: bool, aligned: bool, strided: bool) -> None:
        nonlocal cases
        where = f"{'aligned' if aligned else 'misaligned'} {'strided' if strided else 'contiguous'}"
        name = f"{str(dtype)[6:]}{'/float32' if wide_weight else ''} hidden {hidden} rows {rows} {where}"
        print(name, flush=True)  # before the call, so that a report of the sanitizer stands behind its case
        call(rows, hidden, dtype, wide_weight, aligned, strided, chosen.device, not chosen.no_poison)
        cases += 1

    layouts = list(itertools.product((True, False), (False, True)))
    for hidden in chosen.hidden:
        rows = min(5, max(2, MOST // hidden))
        for dtype, wide_weight in itertools.product(DTYPES, (False, True)):
            if dtype == torch.float32 and wide_weight:
                continue
            for aligned, strided in layouts if hidden <= 16_384 else [(True, False), (False, True)]:
                run(rows, hidden, dtype, wide_weight, aligned, strided)
    for rows, hidden in itertools.product((0, 1, chosen.many_rows), (8, 33, 1000)):
        run(rows, hidden, torch.bfloat16, False, True, False)
    if chosen.device == "cuda":
        torch.cuda.synchronize()
    print(f"{cases} cases")
    print("ok")


if __name__ == "__main__":
    main()
