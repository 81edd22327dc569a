"""RMSNorm and its fusion with the addition before it, by the kernels of csrc/, on CUDA and on the CPU.

What dispatches to what: without gradients the op `*_inference`, which saves nothing; with them the function
`RMSNormFunction` or `AddRMSNormFunction` around the ops `rmsnorm`, `add_rmsnorm` and their `*_backward`. Inside
torch.compile, and where `torch.ops.tinylm.*` are called directly, the dispatcher goes to the same functions.

The C++ binding checks what it is given; only when it has refused is the reason put together, in `explain`, so that a
correct call pays nothing for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforming
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from tinylm.ops import native

Tensors = tuple[Tensor, ...]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INSTEAD = "use backend torch or eager"


def rmsnorm_cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., hidden], weight [hidden] -> y like x, contiguous: x / sqrt(mean(x^2) + eps) * weight.

    x in fp32, fp16, bf16 (fp64 on the CPU), weight in x's dtype or fp32; computed in fp32 (fp64 for fp64) and
    rounded once. The last dimension should have stride 1: an x of another layout is copied first.

    Raises ValueError or TypeError for what the kernels cannot take, NativeError where the library cannot be built,
    NotImplementedError for second derivatives and forward-mode differentiation.
    """
    if is_compiling():
        return _traced(x, weight, eps)
    try:
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            if not transforming():
                return _calls.rmsnorm(x, weight, eps)[0]
        elif forward_ad._current_level < 0 and not transforming():
            return _calls.rmsnorm_inference(x, weight, eps)
        ready()
        return RMSNormFunction.apply(x, weight, eps)[0]
    except Exception as error:
        explain(error, "rmsnorm", {"x": x}, weight, eps)
        raise


def add_rmsnorm_cuda(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [..., hidden], weight [hidden] -> (y, new_residual), both like x and contiguous.

    new_residual is x + residual, rounded to their dtype, and y is rmsnorm_cuda(new_residual, weight, eps), bit for
    bit. Under autocast x and residual may differ in dtype: both become the wider. Raises as rmsnorm_cuda does.
    """
    if is_compiling():
        return _traced_add(x, residual, weight, eps)
    try:
        if x.dtype is not residual.dtype:
            x, residual = _promoted(x, residual)
        if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
            if not transforming():
                return _calls.add_rmsnorm(x, residual, weight, eps)[:2]
        elif forward_ad._current_level < 0 and not transforming():
            return _calls.add_rmsnorm_inference(x, residual, weight, eps)
        ready()
        return AddRMSNormFunction.apply(x, residual, weight, eps)[:2]
    except Exception as error:
        explain(error, "add_rmsnorm", {"x": x, "residual": residual}, weight, eps)
        raise


def _traced(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    ready()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return torch.ops.tinylm.rmsnorm.default(x, weight, eps)[0]
    return torch.ops.tinylm.rmsnorm_inference.default(x, weight, eps)


def _traced_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    ready()
    if x.dtype != residual.dtype:
        x, residual = _promoted(x, residual)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        y, new_residual, _ = torch.ops.tinylm.add_rmsnorm.default(x, residual, weight, eps)
        return y, new_residual
    return torch.ops.tinylm.add_rmsnorm_inference.default(x, residual, weight, eps)


def _promoted(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_autocast_enabled(x.device.type):
        return x, residual  # an error, which the op reports
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def _refuse_twice() -> NoReturn:
    raise NotImplementedError(f"rmsnorm: backend cuda has no second derivative; for it, {INSTEAD}")


def _refuse_forward_mode() -> NoReturn:
    raise NotImplementedError(f"rmsnorm: backend cuda has no forward-mode derivative (jvp); for it, {INSTEAD}")


# ------------------------------------------------------------------------------------------------- derivatives
# A function's `apply` is called at its C++ level, without the Python around it that serves torch.func: forward and
# backward of a row of 64 on a CPU then take 40 us, against 49 through a kernel of the dispatcher's Autograd key, 59
# through torch.library.register_autograd, which serves torch.func no better, and 144 of F.rms_norm.
# Inside it the ops are called below autograd, or the dispatcher would come here again.


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Any:
        with below_autograd():
            return torch.ops.tinylm.rmsnorm.default(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> Any:
        if dy is None:
            return None, None, None
        return *_gradients("rmsnorm_backward", dy, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, eps: float) -> Any:
        return _batched_forward(RMSNormFunction.apply, info, dims, x, weight, eps)


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        with below_autograd():
            return torch.ops.tinylm.add_rmsnorm.default(x, residual, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, new_residual, rstd = output
        ctx.save_for_backward(new_residual, inputs[2], rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: None) -> Any:
        if dy is None:
            return dsum, dsum, None, None
        if dsum is None:
            dx, dweight = _gradients("rmsnorm_backward", dy, *ctx.saved_tensors)
        else:
            dx, dweight = _gradients("add_rmsnorm_backward", dy, dsum, *ctx.saved_tensors)
        return dx, dx, dweight, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        return _batched_forward(AddRMSNormFunction.apply, info, dims, x, residual, weight, eps)


class OnceFunction(torch.autograd.Function):
    """A backward op, by name, that refuses to be differentiated."""

    @staticmethod
    def forward(name: str, *tensors: Tensor) -> Any:
        with below_autograd():
            return getattr(torch.ops.tinylm, name).default(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        _refuse_twice()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, dims: Any, name: str, *tensors: Tensor) -> Any:
        return _batched_backward(functools.partial(OnceFunction.apply, name), info, dims[1:], *tensors)


def _gradients(name: str, *tensors: Tensor) -> Tensors:
    if torch.is_grad_enabled():
        return OnceFunction.apply(name, *tensors)
    with below_autograd():
        return getattr(torch.ops.tinylm, name).default(*tensors)


# ------------------------------------------------------------------------------------------------------ batches


def _samples(info: Any, dims: Any, arguments: Any) -> Any:
    """The arguments of each sample of a batch."""
    for i in range(info.batch_size):
        yield [a if d is None else a.select(d, i) for a, d in zip(arguments, dims, strict=True)]


def _stacked(results: list[Tensors]) -> tuple[Tensors, tuple[int, ...]]:
    outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _batched_forward(call: Callable[..., Any], info: Any, dims: Any, *arguments: Any) -> Any:
    """One call for a batch of rows of one weight; where the weight is batched too, a call for each sample."""
    *rows, weight, eps = arguments
    if dims[-2] is not None:
        return _stacked([call(*sample) for sample in _samples(info, dims, arguments)])
    rows = [
        a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
        for a, d in zip(rows, dims[:-2], strict=True)
    ]
    outputs = call(*rows, weight, eps)
    return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)


def _batched_backward(call: Callable[..., Any], info: Any, dims: Any, *tensors: Tensor) -> Any:
    """A call for each sample: each has a gradient of the weight of its own."""
    return _stacked([call(*sample) for sample in _samples(info, dims, tensors)])


# -------------------------------------------------------------------------------------------------------- fakes


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check("rmsnorm", {"x": x}, weight, eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide)


def _fake_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check("add_rmsnorm", {"x": x, "residual": residual}, weight, eps)
    y, rstd = _fake(x, weight, eps)
    return y, torch.empty_like(y), rstd


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None = None) -> Any:
    for name, gradient in (("dy", dy), ("dsum", dsum)):
        if gradient is not None and gradient.shape != x.shape:
            raise ValueError(f"rmsnorm: {name} is {list(gradient.shape)}: give it the shape of x, {list(x.shape)}")
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


# ------------------------------------------------------------------------------------------------------ loading


class Calls:
    """What the hot path calls, bound once. Before, each name loads the library and then is what it stands for."""

    rmsnorm: Callable[..., Any]
    rmsnorm_inference: Callable[..., Any]
    add_rmsnorm: Callable[..., Any]
    add_rmsnorm_inference: Callable[..., Any]
    library: torch.library.Library  # what Python registers with the dispatcher ends with this object

    def __getattr__(self, name: str) -> Any:
        ready()
        return self.__dict__[name]


_calls = Calls()
_lock = threading.Lock()


def ready() -> bool:
    """Loads the library, building it where need be, and registers what Python adds to its ops; once a process."""
    with _lock:
        if "rmsnorm" not in _calls.__dict__:
            native.load()
            _calls.library = torch.library.Library("tinylm", "IMPL")
            _register()
            for name, function in (("rmsnorm", RMSNormFunction), ("add_rmsnorm", AddRMSNormFunction)):
                inference = getattr(torch.ops.tinylm, f"{name}_inference").default
                # The C++ callable within: 0.2 us less than the call of Python around it.
                setattr(_calls, f"{name}_inference", inference._op)
                setattr(_calls, name, super(torch.autograd.Function, function).apply)  # type: ignore[misc]
    return True


# What torch.compiler.assume_constant_result does, which would import torch._dynamo: torch.compile calls it while it
# traces, and leaves nothing of it in the graph.
ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register() -> None:
    register_fake, register_vmap = torch.library.register_fake, torch.library.register_vmap
    register_fake("tinylm::rmsnorm", _fake)
    register_fake("tinylm::rmsnorm_inference", lambda x, weight, eps: _fake(x, weight, eps)[0])
    register_fake("tinylm::add_rmsnorm", _fake_add)
    register_fake("tinylm::add_rmsnorm_inference", lambda *arguments: _fake_add(*arguments)[:2])
    register_fake("tinylm::rmsnorm_backward", _fake_backward)
    register_fake(
        "tinylm::add_rmsnorm_backward",
        lambda dy, dsum, sum, weight, rstd: _fake_backward(dy, sum, weight, rstd, dsum),
    )
    for name in ("rmsnorm", "add_rmsnorm"):
        for forward in (name, f"{name}_inference"):
            op = getattr(torch.ops.tinylm, forward).default
            register_vmap(f"tinylm::{forward}", functools.partial(_batched_forward, op))
        backward = getattr(torch.ops.tinylm, f"{name}_backward").default
        register_vmap(f"tinylm::{name}_backward", functools.partial(_batched_backward, backward))

        _calls.library.impl(name, functools.partial(_autograd, name), "Autograd")


def _autograd(name: str, *arguments: Any) -> Any:
    if transforming():
        raise NotImplementedError(f"torch.ops.tinylm.{name}: for torch.func call ops.get({name!r}, 'cuda')")
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return getattr(_calls, name)(*arguments)
    with below_autograd():
        return getattr(torch.ops.tinylm, name).default(*arguments)


# ----------------------------------------------------------------------------------------------------- mistakes


def problem(op: str, rows: dict[str, Any], weight: Any, eps: Any) -> Exception | None:
    """What is wrong with the arguments (rows: x, and residual where there is one), as the exception to raise."""
    tensors = {**rows, "weight": weight}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            return TypeError(f"{op}: {name} is a {type(tensor).__name__}: give a tensor")
        if tensor.is_nested:
            return TypeError(f"{op}: {name} is a nested tensor: give its values(), or {INSTEAD}")
        if tensor.layout != torch.strided:
            return TypeError(f"{op}: {name} has layout {tensor.layout}: give a dense tensor, such as to_dense() of it")
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            return ValueError(f"{op}: {name} is on {tensor.device}: backend cuda knows cpu and cuda; {INSTEAD}")
        if tensor.is_quantized:
            return TypeError(f"{op}: {name} is quantized: give dequantize() of it")
    x = rows["x"]
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            return ValueError(f"{op}: x is on {x.device} and {name} on {tensor.device}: move them to one device")
    if x.dtype not in DTYPES:
        return TypeError(f"{op}: x is {_name(x.dtype)}: give one of {', '.join(map(_name, DTYPES))}")
    if x.dtype == torch.float64 and x.is_cuda:
        return TypeError(f"{op}: x is float64 on {x.device}: backend cuda has it on the CPU alone; {INSTEAD}")
    if weight.dtype not in (x.dtype, torch.float32):
        return TypeError(f"{op}: weight is {_name(weight.dtype)}: give it in float32 or, like x, in {_name(x.dtype)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        return ValueError(f"{op}: x is {list(x.shape)}: its last dimension must exist and not be empty")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        return ValueError(
            f"{op}: weight is {list(weight.shape)} and x {list(x.shape)}: give a weight of [{x.shape[-1]}]"
        )
    residual = rows.get("residual", x)
    if residual.dtype != x.dtype:
        return TypeError(f"{op}: x is {_name(x.dtype)} and residual {_name(residual.dtype)}: give one dtype")
    if residual.shape != x.shape:
        return ValueError(f"{op}: x is {list(x.shape)} and residual {list(residual.shape)}: give one shape")
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)):
        return TypeError(f"{op}: eps is a {type(eps).__name__}: give a positive number, such as 1e-5")
    if not eps > 0:
        return ValueError(f"{op}: eps is {eps}: give a positive number, such as 1e-5")
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(op: str, rows: dict[str, Any], weight: Any, eps: Any) -> None:
    wrong = problem(op, rows, weight, eps)
    if wrong is not None:
        raise wrong


def explain(error: Exception, op: str, rows: dict[str, Any], weight: Any, eps: Any) -> None:
    """Raises what was wrong with the arguments of a call that failed; returns if that was nothing."""
    wrong = problem(op, rows, weight, eps)
    if wrong is None and isinstance(error, NotImplementedError) and "'CUDA' backend" in str(error):
        wrong = native.NativeError(f"{op}: the library was built without CUDA: install nvcc, or {INSTEAD}")
    if wrong is None and "out of memory" in str(error) and rows["x"].is_cuda:
        wrong = torch.OutOfMemoryError(str(error))
    if wrong is not None:
        raise wrong from error
