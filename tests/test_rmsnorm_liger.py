from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from tinylm import ops
from tinylm.ops.rmsnorm_liger import _functions

OPS = ["rmsnorm", "add_rmsnorm"]


@pytest.mark.parametrize("op", OPS)
def test_off_a_gpu_it_says_where_it_runs(op: str) -> None:
    reason = str(ops.probe(op, "liger", "cpu", torch.float32))
    assert "runs on a CUDA device" in reason and "cpu" in reason
    assert "liger-kernel" in ops.remedy_for(reason)


def test_where_it_is_not_installed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _functions.cache_clear()
    for name in ("rms_norm", "fused_add_rms_norm"):
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", None)
    with pytest.raises(RuntimeError, match=r"liger-kernel is not installed.*pip install 'liger-kernel>=") as error:
        _functions()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_where_it_runs_it_is_the_op_and_leaves_its_inputs(op: str, dtype: torch.dtype) -> None:
    assert ops.probe(op, "liger", "cuda", dtype) is None
    arguments = ops.EXAMPLES[op](device="cuda", dtype=dtype)
    given = [a.clone() for a in arguments[:-1]]
    with torch.inference_mode():
        inference = ops.get(op, "liger")(*arguments)
    tensors = [a.requires_grad_() for a in arguments[:-1]]
    results = ops.get(op, "liger")(*arguments)
    expected = ops.REFERENCES[op](*arguments)
    if op == "rmsnorm":
        inference, results, expected = (inference,), (results,), (expected,)
    gradients = [torch.randn_like(y) for y in results]
    kept = [dy.clone() for dy in gradients]
    found = torch.autograd.grad(results, tensors, gradients)
    wanted = torch.autograd.grad(expected, tensors, [dy.to(y.dtype) for dy, y in zip(gradients, expected, strict=True)])
    # One rounding of each result: of the sum before it, of y; sums of 64 fp32 terms are closer than that.
    tolerance = 2 * torch.finfo(dtype).eps + 1e-5
    for got, same, want in zip(results, inference, expected, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, want.to(dtype), rtol=tolerance, atol=tolerance)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=4 * tolerance, atol=4 * tolerance)
    assert all(map(torch.equal, (*given, *kept), (*(a.detach() for a in arguments[:-1]), *gradients)))
