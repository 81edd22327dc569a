"""That registers and shared memory leave the occupancy that csrc's kernels assume, from the compiler's report."""

from __future__ import annotations

import re
from typing import NamedTuple

import ptxas
import pytest


class Card(NamedTuple):
    """Of one multiprocessor (CUDA programming guide, compute capabilities); bytes of shared memory."""

    threads: int
    shared: int
    block_shared: int


CARDS = {
    "sm_75": Card(1024, 64 << 10, 64 << 10),  # RTX 2070
    "sm_80": Card(2048, 164 << 10, 163 << 10),
    "sm_86": Card(1536, 100 << 10, 99 << 10),
    "sm_89": Card(1536, 100 << 10, 99 << 10),  # RTX 4090
    "sm_90": Card(2048, 228 << 10, 227 << 10),
}
LANES, BLOCK, CLUSTER = range(3)


def blocks(use: ptxas.Use, threads: int, dynamic: int, card: Card) -> int:
    """How many blocks of a kernel a multiprocessor holds: registers come by 256 a warp, 1 KiB of shared memory is
    the driver's from sm_80 on."""
    registers = 65_536 // (-(-use.registers * 32 // 256) * 256 * (threads // 32))
    shared = use.shared + dynamic + 1024
    return min(registers, card.threads // threads, card.shared // shared if shared <= card.block_shared else 0)


def kernels(arch: str, name: str) -> list[tuple[list[str], ptxas.Use]]:
    """(template arguments, use) of the kernels of one name; sm_90's clusters are empty elsewhere."""
    found = []
    for kernel, use in ptxas.report()[arch].items():
        if match := re.match(rf"void tinylm::{name}<([^>]*)>", kernel):
            found.append(([re.sub(r"^\(.*\)", "", each.strip()) for each in match[1].split(",")], use))
    assert found, f"no kernel {name} for {arch}"
    return found


@pytest.mark.parametrize("arch", CARDS)
def test_forward_has_enough_threads_to_keep_loads_on_their_way(arch: str) -> None:
    """By packs: 1,024 threads of 2 to 4 packs, 512 of 8, are 32 KB and more on their way; of add_rmsnorm twice that."""
    card = CARDS[arch]
    for (_, packs, span, add, shift), use in kernels(arch, "rmsnorm_rows"):
        if shift == "true":
            continue  # the next test
        threads = 64 if int(span) == LANES else 512
        enough = 1024 if add == "false" else 512
        assert blocks(use, threads, 0, card) * threads >= enough, (arch, packs, span, add, use)


@pytest.mark.parametrize("arch", CARDS)
def test_rows_that_start_anywhere_find_room(arch: str) -> None:
    """A block of 256 threads and 4 packs each: a row of up to 8,192 halves."""
    card = CARDS[arch]
    for (_, packs, span, add, shift), use in kernels(arch, "rmsnorm_rows"):
        if shift == "true" and packs == "4" and int(span) == BLOCK:
            dynamic = 16 * (1024 + 8) * (2 if add == "true" else 1)
            assert blocks(use, 256, dynamic, card) >= 1, (arch, add, use)


@pytest.mark.parametrize("arch", CARDS)
def test_backward_has_the_threads_it_is_planned_for(arch: str) -> None:
    """256 threads, with one row of 256 threads' packs at least on its way on a Turing card, three on the others."""
    card = CARDS[arch]
    for (_, span, both, shift), use in kernels(arch, "rmsnorm_grad_rows"):
        if int(span) != BLOCK:
            continue
        tensors = 3 if both == "true" else 2
        stages = 1 if arch == "sm_75" or shift == "true" or tensors == 3 else 3
        dynamic = 16 * (1024 + 8 * (shift == "true")) * (stages * tensors + (shift == "true"))
        if dynamic + use.shared + 2048 > card.block_shared:
            assert arch == "sm_75" and tensors == 3  # such rows are read from L2 twice there
            continue
        assert blocks(use, 256, dynamic, card) >= 1, (arch, span, both, shift, use)


@pytest.mark.parametrize("arch", CARDS)
def test_the_next_matrix_finds_room_beside_the_one_before(arch: str) -> None:
    """Two blocks of 256 threads a multiprocessor: kernels of a token overlap (csrc/matvec.cu)."""
    for name in ("matvec_rows", "one_query"):
        for arguments, use in kernels(arch, rf"\(anonymous namespace\)::{name}"):
            fit = blocks(use, 256, 0, CARDS[arch])
            assert fit >= (1 if arch == "sm_75" and use.shared > 30 << 10 else 2), (arguments, use)


@pytest.mark.parametrize("arch", CARDS)
def test_decode_is_one_block_of_512_threads_that_spills_nothing(arch: str) -> None:
    """What the plan leaves to the kernel itself is 4 KB of shared memory (csrc/decode.h)."""
    for _, use in kernels(arch, "decode::decode_tokens"):
        assert blocks(use, 512, 0, CARDS[arch]) >= 1 and use.shared <= 4096, use
        assert use.stack == use.spill_stores == use.spill_loads == 0, use
