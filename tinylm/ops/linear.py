"""Linear: y = x @ weight.T + bias; an op too, so that quantized weights are one more backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearOp = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification, in fp64: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`."""
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """weight [out, in], bias [out] or None, applied by one of the op's backends. Its owner initializes it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, op: LinearOp) -> None:
        super().__init__()
        self.in_features, self.out_features, self.op = in_features, out_features, op
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.bias)
