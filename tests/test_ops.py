from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tinylm import ops
from tinylm.ops.linear import linear_torch
from tinylm.ops.rmsnorm import compiled_rmsnorm, rmsnorm_reference

CHEAP = [(op, backend) for op, backends in ops.OPS.items() for backend in backends if backend != "compile"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
cheap_rmsnorms = st.sampled_from([backend for op, backend in CHEAP if op == "rmsnorm"])


def ulp(dtype: torch.dtype) -> float:
    """Spacing of the numbers next to 1: a rounding is off by half of it at most."""
    return torch.finfo(dtype).eps


def gradients(y: Tensor, inputs: tuple[Tensor, Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, dy.to(y.dtype))


@given(
    backend=cheap_rmsnorms,
    dtype=st.sampled_from(DTYPES),
    lead=st.lists(st.integers(0, 5), max_size=3),
    hidden=st.integers(1, 300),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_rmsnorm_is_its_reference(
    backend: str, dtype: torch.dtype, lead: list[int], hidden: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(*lead, hidden) * scale).to(dtype).requires_grad_()
    weight = torch.randn(hidden).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    y = ops.get("rmsnorm", backend)(x, weight, 1e-5)
    expected = rmsnorm_reference(x, weight, 1e-5)
    assert y.shape == x.shape and y.dtype == dtype
    # Computed in fp32 or wider: a sum of n squares errs by sqrt(n) roundings, typically, and x^2, rsqrt and
    # the two products by one or two each; then one rounding to the output's dtype.
    wide = torch.promote_types(dtype, torch.float32)
    rtol = ulp(dtype) + (8 + math.sqrt(hidden)) * ulp(wide)
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=torch.finfo(dtype).tiny)
    # dx is the difference of two terms of size |weight dy| / rms, the second a sum over hidden; dw is a sum
    # over rows. So their errors, in the computation's dtype, are relative to those sizes; then one rounding.
    with torch.no_grad():
        rms = x.double().pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()
        size_dx = (weight.double() * dy.double() / rms).abs().amax().item() if x.numel() else 0.0
        size_dw = (dy.double() * x.double() / rms).abs().amax().item() if x.numel() else 0.0
    dx, dw = gradients(y, (x, weight), dy)
    dx_expected, dw_expected = gradients(expected, (x, weight), dy)
    rows, roundings = x.numel() // hidden, 8 + math.sqrt(hidden)
    torch.testing.assert_close(dx, dx_expected, rtol=ulp(dtype), atol=2 * size_dx * roundings * ulp(wide))
    torch.testing.assert_close(dw, dw_expected, rtol=ulp(dtype), atol=rows * size_dw * roundings * ulp(wide))


@given(backend=cheap_rmsnorms, power=st.integers(-3, 3), seed=st.integers(0, 2**31))
def test_rmsnorm_does_not_see_the_scale(backend: str, power: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(3, 32), torch.randn(32)
    rmsnorm = ops.get("rmsnorm", backend)
    # A power of two changes no digit, and with eps scaled by its square nothing is left of it.
    torch.testing.assert_close(rmsnorm(x * 2**power, weight, 1e-5 * 4**power), rmsnorm(x, weight, 1e-5))


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rmsnorm_squares_in_fp32(backend: str, dtype: torch.dtype) -> None:
    # 300^2 overflows fp16, and in fp16 an eps of 1e-8 is 0.
    y = ops.get("rmsnorm", backend)(torch.full((2, 64), 300.0, dtype=dtype), torch.ones(64, dtype=dtype), 1e-8)
    assert torch.equal(y, torch.ones_like(y))
    zero = ops.get("rmsnorm", backend)(torch.zeros(2, 64, dtype=dtype), torch.ones(64, dtype=dtype), 1e-8)
    assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_rmsnorm_takes_strided_rows_and_expanded_gradients(backend: str) -> None:
    fused = torch.randn(5, 96, dtype=torch.float64)
    x = fused[:, 32:64].requires_grad_()
    weight = torch.randn(32, dtype=torch.float64)
    y = ops.get("rmsnorm", backend)(x, weight, 1e-5)
    torch.testing.assert_close(y, rmsnorm_reference(x, weight, 1e-5))
    y.sum().backward()  # its dy is one number, expanded
    assert x.grad is not None and x.grad.isfinite().all()


@given(bias=st.booleans(), lead=st.lists(st.integers(0, 4), max_size=2), seed=st.integers(0, 2**31))
def test_linear_is_its_reference(bias: bool, lead: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(*lead, 7), torch.randn(5, 7)
    b = torch.randn(5) if bias else None
    expected = ops.REFERENCES["linear"](x, weight, b)
    # Seven products and a bias: eight roundings at most, of no more than the sum of the terms' sizes.
    sizes = ops.REFERENCES["linear"](x.abs(), weight.abs(), None if b is None else b.abs())
    error = (linear_torch(x, weight, b).double() - expected).abs()
    assert (error <= 8 * ulp(torch.float32) * sizes).all()


@pytest.mark.parametrize(("op", "backend"), CHEAP)
def test_a_backend_here_passes_its_probe(op: str, backend: str) -> None:
    assert ops.probe(op, backend, "cpu", torch.float32) is None


def test_the_table_has_a_reference_an_example_and_a_default_for_each_op() -> None:
    assert ops.OPS.keys() == ops.DEFAULTS.keys() == ops.REFERENCES.keys() == ops.EXAMPLES.keys()
    for op, backend in ops.DEFAULTS.items():
        assert backend in ops.OPS[op]


@pytest.mark.parametrize(("op", "backend", "known"), [("rmsnrom", "torch", "linear"), ("rmsnorm", "cud", "eager")])
def test_an_unknown_name_is_an_error_that_names_the_known(op: str, backend: str, known: str) -> None:
    for call in (ops.get, lambda o, b: ops.probe(o, b, "cpu", torch.float32)):
        with pytest.raises(ValueError, match=known) as error:
            call(op, backend)
        assert "\n" not in str(error.value)


def test_a_backend_that_cannot_run_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def broken(*arguments: Any) -> Tensor:
        tries.append(arguments)
        raise RuntimeError("\n  Cannot find a working triton installation.\nMore at https://example.org\n")

    # Without the real `compile`: what it costs is another test's.
    monkeypatch.setitem(ops.OPS, "rmsnorm", {"eager": ops.get("rmsnorm", "eager"), "broken": broken})
    reason = ops.probe("rmsnorm", "broken", "cpu", torch.float32)
    assert reason == "RuntimeError: Cannot find a working triton installation."
    assert ops.probe("rmsnorm", "broken", torch.device("cpu"), torch.float32) == reason
    assert len(tries) == 1, "tried once"
    rows = {component: row for component, *row in ops.doctor("cpu")}
    assert rows["rmsnorm/eager"] == [True, "runs on cpu", ""]
    assert rows["rmsnorm/broken"] == [False, reason, ops.REMEDIES["triton"]]


def test_a_probe_tries_the_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.OPS["rmsnorm"], "forward_only", lambda x, weight, eps: x.detach())
    assert "RuntimeError" in str(ops.probe("rmsnorm", "forward_only", "cpu", torch.float32))
    monkeypatch.setitem(ops.OPS["rmsnorm"], "nan", lambda x, weight, eps: x * weight * math.nan)
    assert "not finite" in str(ops.probe("rmsnorm", "nan", "cpu", torch.float32))


def test_a_probe_leaves_the_random_state_and_works_in_inference_mode() -> None:
    ops._probe.cache_clear()
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert ops.probe("rmsnorm", "eager", "cpu", torch.float32) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_an_absent_device_is_a_reason_with_a_remedy() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert ops.probe("rmsnorm", "eager", "cuda", torch.float32) is not None
    assert all(not ok and detail and remedy for _, ok, detail, remedy in ops.doctor("cuda"))


# torch.compile imports parts of torch that warn of their own deprecations.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@compiles
def test_compile_compiles_every_shape_however_many() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    rmsnorm = compiled_rmsnorm(count)
    assert not graphs, "nothing is compiled before the first call"
    shapes = [(rows, hidden) for rows in (1, 2, 3, 4, 5) for hidden in (8, 16, 24, 32)]
    for _ in range(2):
        for shape in shapes:
            x, weight = torch.randn(shape), torch.randn(shape[-1])
            torch.testing.assert_close(rmsnorm(x, weight, 1e-5), rmsnorm_reference(x, weight, 1e-5).float())
    # Dynamo's own limit is 8 per function.
    assert len(graphs) == len(shapes)


@compiles
def test_compile_inside_a_compiled_function_is_one_graph() -> None:
    outer = torch.compile(lambda x, w: compiled_rmsnorm()(x * 2, w, 1e-5), fullgraph=True, backend="eager")
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(outer(x, weight), rmsnorm_reference(x * 2, weight, 1e-5).float())


@compiles
def test_compile_as_it_ships() -> None:
    reason = ops.probe("rmsnorm", "compile", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    y, expected = ops.get("rmsnorm", "compile")(x, weight, 1e-5), rmsnorm_reference(x, weight, 1e-5)
    torch.testing.assert_close(y, expected.float())
    dy = torch.randn_like(x)
    torch.testing.assert_close(gradients(y, (x, weight), dy), gradients(expected, (x, weight), dy))


def test_the_ops_are_plain_callables() -> None:
    for backends in ops.OPS.values():
        assert all(isinstance(backend, types.FunctionType) for backend in backends.values())
