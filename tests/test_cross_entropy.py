"""Linear cross-entropy: every backend against fp64, and what `chunked` promises beyond: its memory, its errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import LossCase, loss_cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinylm import ops
from tinylm.config import preset
from tinylm.model import Transformer
from tinylm.ops.cross_entropy import (
    chunked_sum,
    chunked_sum_op,
    compiled_linear_cross_entropy,
    linear_cross_entropy_chunked,
    linear_cross_entropy_reference,
    rows_of_a_chunk,
)

# torch.compile imports parts of torch that warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

DEVICES = ("cpu", "cuda")
# Rows that a GPU holds in registers, and rows that it reads twice, the last block of which is not full.
LARGE = LossCase(tokens=300, dim=64, vocab_size=9001, dtype=torch.bfloat16, ignored=0.1, rows=128)
LARGER = LossCase(tokens=100, dim=64, vocab_size=17_001, dtype=torch.bfloat16, ignored=0.1, rows=64)


def needs(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


def backend_of(name: str, case: LossCase) -> Callable[..., Tensor]:
    if name == "chunked":
        return lambda *inputs: linear_cross_entropy_chunked(*inputs, rows=case.rows)
    # What Inductor does to it is torch's own business; that it is handed over right, and compiled once, is ours.
    return compiled_linear_cross_entropy("aot_eager") if name == "compile" else ops.get("linear_cross_entropy", name)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def assert_near(
    loss: Tensor, dx: Tensor, dweight: Tensor, inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    """What a backend found, which multiplies in `dtype`, is as near to fp64 as its roundings allow.

    u is half the spacing of `dtype` at 1, and w that of fp32 (or fp64), which sums and exponentials are in. A logit
    is a sum of C products rounded to dtype: off by d <= (C w + u) times the sum of the products' sizes. log(sum(exp))
    moves no more than the logits, and has V + 8 roundings of its own besides; a loss is a difference of two such.
    A probability is off by the factor exp(2 d + (V + 8) w) - 1 at most, and rounded to dtype; each gradient is a
    sum over V or N of products with these, rounded to dtype where a chunk ends and where it is scaled.
    """
    x, weight, targets = (tensor.detach() for tensor in inputs)
    counts, (tokens, dim), vocab_size = targets != -100, x.shape, weight.shape[0]
    x64, w64 = x.to(dtype).double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    exact = linear_cross_entropy_reference(x64, w64, targets)
    exact_dx, exact_dweight = gradients(exact, x64, w64)
    x64, w64 = x64.detach(), w64.detach()
    u = torch.finfo(dtype).eps / 2
    w = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2

    logits = x64 @ w64.T
    off = ((dim * w + u) * (x64.abs() @ w64.abs().T)).amax(1, keepdim=True)
    largest = logits.abs().amax(1, keepdim=True)
    off_loss = 2 * off[:, 0] + w * (vocab_size + 8 + 4 * largest[:, 0])
    mean = 2 * off_loss[counts].mean() + tokens * w * exact.abs()
    assert (loss.double() - exact).abs() <= mean

    p = logits.softmax(1)
    onehot = F.one_hot(targets.clamp(min=0), vocab_size)
    g = ((p - onehot).abs() * counts[:, None]) / counts.sum()
    off_g = p * torch.expm1(2 * off + w * (vocab_size + 8 + 4 * largest)) / counts.sum() * counts[:, None]
    # Both p and the difference are rounded; subnormal numbers, in fp16, have a spacing that does not shrink.
    off_g += 3 * u * (p + onehot) / counts.sum() * counts[:, None] + torch.finfo(dtype).smallest_normal * 2 * u
    tiny = torch.finfo(dtype).smallest_normal * 2 * u * 2
    for found, expected, size, bound in (
        (dx, exact_dx, g @ w64.abs(), off_g @ w64.abs()),
        (dweight, exact_dweight, g.T @ x64.abs(), off_g.T @ x64.abs()),
    ):
        # A product's own sum, and up to three roundings to dtype: of each chunk's part, of the sum, of it scaled.
        bound = bound + (4 * u + (max(tokens, vocab_size) + 4) * w) * size + tiny
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ops.OPS["linear_cross_entropy"])
def test_a_backend_is_near_the_reference(name: str, device: str) -> None:
    needs(device)

    @settings(max_examples=2 if name == "compile" else 60)  # a compilation each
    @example(LARGE)
    @example(LARGER)
    @example(LossCase(tokens=5, dim=3, vocab_size=1))
    @given(case=loss_cases)
    def check(case: LossCase) -> None:
        inputs = case.inputs(device)
        loss = backend_of(name, case)(*inputs)
        dx, dweight = gradients(loss, *inputs[:2])
        assert loss.dtype == torch.promote_types(case.dtype, torch.float32) and loss.shape == ()
        assert dx.dtype == dweight.dtype == case.dtype
        assert_near(loss, dx, dweight, inputs, case.dtype)

    check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ops.OPS["linear_cross_entropy"])
def test_autocast_is_that_of_a_product(name: str, device: str) -> None:
    needs(device)
    for case in (LossCase(tokens=30, dim=16, vocab_size=50, ignored=0.3), LARGE, LARGER):
        inputs = tuple(t.detach().float().requires_grad_() if t.is_floating_point() else t for t in case.inputs(device))
        with torch.autocast(device, torch.bfloat16):
            loss = backend_of(name, case)(*inputs)
        dx, dweight = gradients(loss, *inputs[:2])
        assert loss.dtype == dx.dtype == dweight.dtype == torch.float32
        assert_near(loss, dx, dweight, inputs, torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_of_weight_is_summed_in_fp32(device: str) -> None:
    """Parts that bf16 could not add up: of 320 equal parts it would lose those after 256."""
    needs(device)
    x = torch.ones(640, 1, device=device)
    weight = torch.zeros(2, 1, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy_chunked(x, weight, torch.zeros(640, dtype=torch.int64, device=device), rows=2)
    loss.backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [-0.5, 0.5]


@given(case=loss_cases, power=st.integers(-8, 8))
def test_what_comes_from_above_multiplies(case: LossCase, power: int) -> None:
    """A power of two, as a GradScaler has: exactly; in fp16 it saves gradients that would else be too small."""
    inputs = case.inputs()
    loss = linear_cross_entropy_chunked(*inputs, rows=case.rows)
    plain = gradients(loss, *inputs[:2])
    scaled = gradients(2.0**power * linear_cross_entropy_chunked(*inputs, rows=case.rows), *inputs[:2])
    for a, b in zip(plain, scaled, strict=True):
        a, b = a.double() * 2.0**power, b.double()
        normal = a.abs() > torch.finfo(case.dtype).smallest_normal * 2.0 ** (abs(power) + 1)
        assert torch.equal(a[normal], b[normal])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ops.OPS["linear_cross_entropy"])
def test_nothing_to_predict_is_nan_without_gradients(name: str, device: str) -> None:
    needs(device)
    x, weight, targets = LossCase(tokens=5, dim=4, vocab_size=7).inputs(device)
    loss = backend_of(name, LossCase(5, 4, 7, rows=2))(x, weight, torch.full_like(targets, -100))
    assert loss.isnan()
    assert all(not gradient.any() for gradient in gradients(loss, x, weight))


def test_second_derivatives_are_refused() -> None:
    x, weight, targets = LossCase(tokens=5, dim=4, vocab_size=7).inputs()
    (dx,) = torch.autograd.grad(linear_cross_entropy_chunked(x, weight, targets), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="use backend eager"):
        dx.sum().backward()


def test_the_op_is_one_as_torch_wants_it() -> None:
    x, weight, targets = LossCase(tokens=9, dim=4, vocab_size=7, ignored=0.3).inputs()
    # Not test_aot_dispatch_dynamic, which differentiates all outputs: those that are gradients refuse it.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for flags in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(chunked_sum_op, (x, weight, targets, 4, torch.float32, *flags), test_utils=tests)


def test_it_is_a_node_of_a_whole_compiled_graph() -> None:
    case = LossCase(tokens=30, dim=16, vocab_size=50, ignored=0.3, rows=7)
    x, weight, targets = case.inputs()

    def double(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return 3 * linear_cross_entropy_chunked(2 * x, weight, targets, rows=case.rows)

    whole = torch.compile(double, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain, compiled = double(x, weight, targets), whole(x, weight, targets)
        assert torch.equal(plain, compiled)
        for a, b in zip(gradients(plain, x, weight), gradients(compiled, x, weight), strict=True):
            assert torch.equal(a, b)


def test_a_models_training_step_compiles_whole() -> None:
    torch.manual_seed(0)
    model = Transformer(preset("nano"))
    tokens = torch.randint(512, (2, 9))
    plain = model.loss(tokens[:, :-1], tokens[:, 1:])
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(plain, compiled)
    parameters = list(model.parameters())
    for a, b in zip(gradients(plain, *parameters), gradients(compiled, *parameters), strict=True):
        assert torch.equal(a, b)


class Made(TorchDispatchMode):
    """The sizes, in elements, of all tensors made, within our op too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tinylm":
            with self:
                return chunked_sum(*args)
        found = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        old = {tensor.untyped_storage().data_ptr() for tensor in given if isinstance(tensor, Tensor)}
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in old:  # no view, no out=
            self.sizes.append(found.untyped_storage().nbytes() // 4)
        return found


def test_no_more_than_a_chunk_of_logits_is_ever_made() -> None:
    case = LossCase(tokens=1024, dim=8, vocab_size=500, rows=64)
    x, weight, targets = case.inputs()
    with Made() as made:
        linear_cross_entropy_chunked(x, weight, targets, rows=case.rows).backward()
    assert max(made.sizes) == case.rows * case.vocab_size, "a chunk of logits, larger than either gradient"
    with Made() as eager:
        ops.get("linear_cross_entropy", "eager")(x, weight, targets).backward()
    assert max(eager.sizes) == case.tokens * case.vocab_size, "what is counted can be large"


@pytest.mark.parametrize("wants", [(False, False), (True, False), (False, True)])
def test_a_gradient_that_nobody_wants_is_not_made(wants: tuple[bool, bool]) -> None:
    case = LossCase(tokens=1024, dim=64, vocab_size=500, rows=32)
    x, weight, targets = case.inputs()
    x.requires_grad_(wants[0]), weight.requires_grad_(wants[1])
    with Made() as made:
        loss = linear_cross_entropy_chunked(x, weight, targets, rows=case.rows)
    assert loss.requires_grad == any(wants)
    assert (x.numel() in made.sizes) == wants[0]
    assert (weight.numel() in made.sizes) == (wants[1])
    with torch.no_grad(), Made() as made:
        assert torch.equal(linear_cross_entropy_chunked(x, weight, targets, rows=case.rows), loss.detach())
    assert not {x.numel(), weight.numel()} & set(made.sizes)


@given(
    rows=st.integers(0, 1 << 22),
    vocab_size=st.integers(1, 300_000),
    itemsize=st.sampled_from([2, 4, 8]),
    limit=st.sampled_from([1 << 25, 1 << 29]),
)
@example(rows=48 * 1024, vocab_size=50_304, itemsize=2, limit=1 << 29)
def test_chunks_are_few_equal_and_small(rows: int, vocab_size: int, itemsize: int, limit: int) -> None:
    chunk = rows_of_a_chunk(rows, vocab_size, itemsize, limit)
    assert 1 <= chunk <= max(rows, 1)
    # Rounded up to whole tiles, of which there is one at least.
    assert chunk * vocab_size * itemsize <= limit + 128 * vocab_size * itemsize
    assert chunk * vocab_size < 1 << 31
    count = -(-rows // chunk)
    assert chunk % 128 == 0 or count <= 1
    least = max(1, -(-rows * vocab_size * itemsize // limit))
    assert count <= max(1, 2 * least - 1)
    if (rows, vocab_size) == (48 * 1024, 50_304):
        assert chunk == 4096


@pytest.mark.parametrize("target", [7, -1, -101, 1 << 40])
def test_a_target_that_is_no_token(target: int) -> None:
    x, weight, targets = LossCase(tokens=5, dim=4, vocab_size=7).inputs()
    targets[3] = target
    with pytest.raises(ValueError, match=r"give -100 or 0\.\.6") as error:
        linear_cross_entropy_chunked(x, weight, targets)
    assert "\n" not in str(error.value)
    if torch.cuda.is_available():  # where asking would be waiting
        x, weight, targets = x.detach().cuda().requires_grad_(), weight.detach().cuda(), targets.cuda()
        loss = linear_cross_entropy_chunked(x, weight, targets)
        loss.backward()
        assert loss.isnan()


BAD: dict[str, tuple[type[Exception], Any]] = {
    "x is a list": (TypeError, lambda x, w, t: ([1.0], w, t)),
    "targets are torch.int32": (TypeError, lambda x, w, t: (x, w, t.int())),
    "x is torch.int64": (TypeError, lambda x, w, t: (t[:, None], w, t)),
    r"x is torch.float32 and weight torch.bfloat16": (TypeError, lambda x, w, t: (x, w.bfloat16(), t)),
    r"x is \[1, 5, 4\]": (ValueError, lambda x, w, t: (x[None], w, t)),
    r"weight \[7, 3\]": (ValueError, lambda x, w, t: (x, w[:, :3], t)),
    r"targets \[4\]": (ValueError, lambda x, w, t: (x, w, t[:4])),
    "weight on meta": (ValueError, lambda x, w, t: (x, w.to("meta"), t)),
}


@pytest.mark.parametrize("message", BAD)
def test_inputs_that_do_not_fit(message: str) -> None:
    kind, change = BAD[message]
    with pytest.raises(kind, match=message) as error:
        linear_cross_entropy_chunked(*change(*LossCase(tokens=5, dim=4, vocab_size=7).inputs()))
    assert "\n" not in str(error.value)


def test_more_logits_than_32_bits_count() -> None:
    """On a GPU: 49152 x 50304. Each slice's losses are those of a call of its own, so the mean is that of theirs."""
    needs("cuda")
    torch.manual_seed(0)
    x = torch.randn(49_152, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50_304, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(50_304, (49_152,), device="cuda")
    for rows in (4096, 49_152):  # the second: one chunk, whose own offsets pass 2^31
        loss = linear_cross_entropy_chunked(x, weight, targets, rows=rows)
        (dx,) = gradients(loss, x)
        tail = x.detach()[-4096:].requires_grad_()
        of_tail = linear_cross_entropy_chunked(tail, weight, targets[-4096:], rows=4096)
        (expected,) = gradients(of_tail, tail)
        # The same logits, products and roundings but one, by another number of tokens.
        torch.testing.assert_close(12 * dx[-4096:].float(), expected.float(), rtol=2**-7, atol=1e-6)
        slices = zip(x.detach().split(4096), targets.split(4096), strict=True)
        losses = torch.stack([linear_cross_entropy_chunked(a, weight.detach(), t, rows=4096) for a, t in slices])
        torch.testing.assert_close(loss.detach(), losses.mean(), rtol=1e-6, atol=0)


INTERPRETED = """
import torch, torch.nn.functional as F
from tinylm.ops.cross_entropy_triton import to_gradient
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for vocab_size in (1, 3, 100, 9000):
        logits = (3 * torch.randn(6, vocab_size)).to(dtype)
        targets = torch.tensor([0, vocab_size - 1, -100, vocab_size, -1, 0])
        rows = torch.tensor([0, 1, 5])
        exact = logits.double().requires_grad_()
        expected = F.cross_entropy(exact[rows], targets[rows], reduction="none")
        (gradient,) = torch.autograd.grad(expected.sum(), exact)
        losses, kept = torch.empty(6), logits.clone()
        to_gradient(logits, targets, losses, False)
        assert torch.equal(kept, logits)
        # Roundings of the sum and of logits of 16 at most; of probabilities, those and one to dtype.
        fp32, u = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
        bound = fp32 * (vocab_size + 64)
        assert ((losses[rows] - expected).abs() <= bound).all(), (dtype, vocab_size)
        assert losses[2] == 0 and losses[3:5].isnan().all()
        to_gradient(logits, targets, losses, True)
        assert ((logits[rows] - gradient[rows]).abs() <= bound + u).all(), (dtype, vocab_size)
        assert not logits[2].any()
"""


def test_the_triton_kernel_interpreted() -> None:
    """Line by line on the CPU, in a process of its own: Triton decides when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_first_loss_is_that_of_guessing() -> None:
    x, weight, targets = LossCase(tokens=50, dim=4, vocab_size=70).inputs()
    loss = linear_cross_entropy_chunked(0 * x, weight, targets)
    assert abs(loss.item() - math.log(70)) < 1e-6
