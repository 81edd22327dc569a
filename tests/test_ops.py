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

CHEAP = [(op, backend) for op, backends in ops.OPS.items() for backend in backends if backend != "compile"]


def ulp(dtype: torch.dtype) -> float:
    """Spacing of the numbers next to 1: a rounding is off by half of it at most."""
    return torch.finfo(dtype).eps


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
    reason = ops.probe(op, backend, "cpu", torch.float32)
    if backend == "liger":
        pytest.skip(str(reason))
    assert reason is None


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


def test_the_ops_are_plain_callables() -> None:
    for backends in ops.OPS.values():
        assert all(isinstance(backend, types.FunctionType) for backend in backends.values())
