"""Hypothesis strategies that several test files share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from tinylm.config import ModelConfig, RopeScaling

rope_scalings = st.one_of(
    st.none(),
    st.builds(RopeScaling, st.just("linear"), st.sampled_from([1.0, 2.0, 7.5])),
    st.builds(
        RopeScaling,
        kind=st.just("llama3"),
        factor=st.sampled_from([1.0, 4.0, 8.0]),
        low_freq_factor=st.just(1.0),
        high_freq_factor=st.sampled_from([2.0, 4.0]),
        original_context=st.sampled_from([4, 16, 64]),
    ),
)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> ModelConfig:
    """Small models of every style: each norm, placement, MLP, position, grouping; `fixed` fields as given."""
    kv_heads = draw(st.integers(1, 3))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(2, 40)),
        "dim": draw(st.sampled_from([8, 12, 32])),
        "layers": draw(st.integers(1, 3)),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 4, 8])),
        "d_ff": draw(st.integers(1, 24)),
        "context": 24,
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_placement": draw(st.sampled_from(["pre", "post"])),
        "mlp": draw(st.sampled_from(["swiglu", "gelu"])),
        "positions": draw(st.sampled_from(["rope", "learned", "none"])),
        "rope_scaling": draw(rope_scalings),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "init_std": 0.3,  # wide, so that a wrong mask or position shows in the logits
    }
    return ModelConfig(**{**fields, **fixed})


@st.composite
def splits(draw: st.DrawFn, total: int) -> list[int]:
    """Positive whole numbers that sum to `total`."""
    cuts = sorted(draw(st.sets(st.integers(1, total - 1)))) if total > 1 else []
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]


# --- RMSNorm ---------------------------------------------------------------------------------------------------------

# Models' own sizes, and what lies around the widths that kernels switch at.
HIDDEN = sorted(
    {1000, 1001, 3072, 4095, 4096, 5120, 11008, 14336, 16384, 32768, 50257, 65536, 70000}
    | {size for power in range(17) for size in (2**power - 1, 2**power, 2**power + 1) if size}
    | {8 * k + d for k in (1, 3, 5, 33, 125, 1250) for d in (-1, 0, 1)}
)
HALF = (torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "sliced", "transposed", "gapped", "expanded")
TAME = ("normal", "small", "constant", "spike", "zero", "denormal", "large")
WILD = ("overflow", "inf", "nan")


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a tensor lies: `layout` of its rows, `offset` elements into its storage."""

    layout: str = "contiguous"
    offset: int = 0

    def place(self, values: Tensor) -> Tensor:
        """A tensor with these values (expanded: the first row's), amid NaN."""
        *lead, hidden = values.shape
        shape, order = list(values.shape), list(range(values.dim()))
        if self.layout == "transposed":
            order = [*reversed(range(len(lead))), len(lead)]
        if self.layout == "expanded":
            shape = [1] * len(lead) + [hidden]
        stored = [shape[i] for i in order]
        if self.layout == "sliced":  # the middle of a fused projection's output
            stored[-1] = 2 * hidden + 3
        if self.layout == "gapped":
            stored[-1] = 2 * hidden
        # Seven more behind the end, for what reads whole vectors.
        storage = torch.full((self.offset + math.prod(stored) + 7,), math.nan, dtype=values.dtype, device=values.device)
        tensor = storage[self.offset : self.offset + math.prod(stored)].view(stored)
        if self.layout == "sliced":
            tensor = tensor[..., hidden // 2 + 1 :][..., :hidden]
        if self.layout == "gapped":
            tensor = tensor[..., ::2]
        tensor = tensor.permute(order)  # the reversal of leading dims is its own inverse
        if self.layout != "expanded":
            return tensor.copy_(values)
        if math.prod(lead):
            tensor.copy_(values.reshape(-1, hidden)[0].expand(shape))
        return tensor.expand(values.shape)


class Inputs(NamedTuple):
    """x, residual, dy, dsum (gradient of new_residual) [..., hidden]; weight [hidden]."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    dy: Tensor
    dsum: Tensor


@dataclasses.dataclass(frozen=True)
class NormCase:
    """A call of RMSNorm, small to print; `inputs` makes its tensors."""

    lead: tuple[int, ...]
    hidden: int
    dtype: torch.dtype = torch.float32
    wide_weight: bool = False  # the weight in fp32 whatever x is
    eps: float = 1e-6
    magnitude: str = "normal"
    x: Placed = Placed()
    residual: Placed = Placed()
    dy: Placed = Placed()
    weight: Placed = Placed()
    seed: int = 0

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    def inputs(self, device: str) -> Inputs:
        draw = torch.Generator().manual_seed(self.seed)
        shape = (*self.lead, self.hidden)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=draw, dtype=torch.float64)

        def rows() -> Tensor:
            if self.magnitude != "mixed":
                return sized(self.magnitude, normal(self.rows, self.hidden), self.dtype)
            kinds = torch.randint(len(TAME + WILD), (self.rows,), generator=draw).tolist()
            each = [sized((TAME + WILD)[kind], normal(1, self.hidden), self.dtype) for kind in kinds]
            return torch.cat([*each, normal(0, self.hidden)])

        def placed(values: Tensor, where: Placed) -> Tensor:
            return where.place(values.to(self.dtype).reshape(shape).to(device))

        x, residual = placed(rows(), self.x), placed(rows(), self.residual)
        weight = normal(self.hidden).to(torch.float32 if self.wide_weight else self.dtype).to(device)
        dy, dsum = placed(normal(*shape), self.dy), placed(normal(*shape), self.residual)
        return Inputs(x, residual, self.weight.place(weight), dy, dsum)


def sized(magnitude: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Normal `values` [rows, hidden] turned into rows of a magnitude; still fp64, the dtype decides what is large."""
    huge = {torch.float16: 1e4, torch.float64: 1e120}.get(dtype, 1e16)  # 70,000 of its squares fit the accumulator
    match magnitude:
        case "normal":
            return values
        case "small":  # eps counts
            return values * 1e-4
        case "constant":
            return values[:, :1].expand_as(values)
        case "spike":
            return torch.where(torch.arange(values.shape[1]) == values.shape[1] // 2, values * 1000, values)
        case "zero":
            return values * 0
        case "denormal":
            return values * (torch.finfo(dtype).tiny / 8)
        case "large":
            return values.clamp(-5, 5) * huge
        case "overflow":  # of the squares; fp16 has none such
            return values * {torch.float16: 1e4, torch.float64: 1e200}.get(dtype, 1e22)
    columns = torch.arange(values.shape[1])
    return torch.where(columns == values.shape[1] - 1, math.nan if magnitude == "nan" else -math.inf, values)


placements = st.builds(Placed, st.sampled_from(LAYOUTS), st.integers(0, 7))


@st.composite
def norm_cases(
    draw: st.DrawFn,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, *HALF, torch.float64),
    magnitudes: Sequence[str] = TAME,
    elements: int = 1 << 15,
    rows: int = 6000,
    **fixed: Any,
) -> NormCase:
    """Calls with at most `elements` numbers (at least one row may have more) and `rows` rows; `fixed` fields as given.

    Small sizes come often and edges of kernels sometimes; fp64 on the CPU alone.
    """
    hidden = draw(
        st.one_of(st.integers(1, 40), st.integers(1, 1200), st.sampled_from(HIDDEN), st.integers(1, 70_000)), "hidden"
    )
    most = min(rows, max(2, elements // hidden))
    drawn = draw(
        st.one_of(
            st.lists(st.integers(0, 4), max_size=4),
            st.lists(st.integers(1, 2), max_size=8),  # more dims than the kernels' interface has
            st.tuples(st.integers(1, most)),
        )
    )
    lead = tuple(drawn) if math.prod(drawn) <= most else (most,)
    fields: dict[str, Any] = {
        "lead": lead,
        "hidden": hidden,
        "dtype": draw(st.sampled_from([dtype for dtype in dtypes if device == "cpu" or dtype != torch.float64])),
        "wide_weight": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-1])),
        "magnitude": draw(st.sampled_from(magnitudes)),
        "x": draw(placements),
        "residual": draw(placements),
        "dy": draw(placements),
        "weight": Placed(draw(st.sampled_from(("contiguous", "gapped"))), draw(st.integers(0, 7))),
        "seed": draw(st.integers(0, 2**16)),
    }
    return NormCase(**{**fields, **fixed})


# --- text ------------------------------------------------------------------------------------------------------------

# Words that repeat, so that there is something to merge, and anything else that a text may have.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            ["the ", "then", " there", "\n", "\n\n", "  ", "\t", "don't", "1234", "<|endoftext|>", "é", "🙂"]
        ),
        st.text(max_size=8),
    ),
    max_size=30,
).map("".join)
# UTF-8, and bytes that are none, between each other.
any_bytes = st.lists(st.one_of(texts.map(str.encode), st.binary(max_size=8)), max_size=6).map(b"".join)
# Documents: no separator inside, and more than whitespace.
documents = texts.map(lambda text: text.replace("<|endoftext|>", "|")).filter(str.strip)


# --- Linear cross-entropy --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LossCase:
    """A call of linear cross-entropy, small to print; `inputs` makes its tensors."""

    tokens: int
    dim: int
    vocab_size: int
    dtype: torch.dtype = torch.float32
    ignored: float = 0.0  # the share of targets that are -100; at least one counts
    scale: float = 1.0  # of x: about the logits' deviation
    rows: int = 8  # of a chunk
    seed: int = 0

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """x (tokens, dim) and weight (vocab_size, dim), which want gradients, and targets (tokens,)."""
        draw = torch.Generator().manual_seed(self.seed)
        x = self.scale * torch.randn(self.tokens, self.dim, generator=draw) / self.dim**0.5
        weight = torch.randn(self.vocab_size, self.dim, generator=draw)
        targets = torch.randint(self.vocab_size, (self.tokens,), generator=draw)
        targets[1:][torch.rand(self.tokens - 1, generator=draw) < self.ignored] = -100
        x, weight = (tensor.to(device, self.dtype).requires_grad_() for tensor in (x, weight))
        return x, weight, targets.to(device)


loss_cases = st.builds(
    LossCase,
    tokens=st.integers(1, 40),
    dim=st.integers(1, 24),
    vocab_size=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, *HALF, torch.float64]),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    rows=st.integers(1, 45),
    seed=st.integers(0, 2**16),
)
