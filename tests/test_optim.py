"""Optimizers against fp64 and textbook formulas, on one rank and on two; clipping, skipped steps; schedules."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinylm.config import PRESETS, ConfigError, ModelConfig, preset
from tinylm.model import Transformer
from tinylm.optim import (
    OPTIMIZERS,
    QUINTIC,
    SCHEDULES,
    Optimizer,
    clip,
    guard,
    make_optimizer,
    orthogonalize,
    schedule,
    set_lr,
)

ROOT = Path(__file__).parents[1]


def by_svd(x: Tensor) -> Tensor:
    """What orthogonalize is to give, in fp64, of x (rows, columns): the polynomial on the singular values alone."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


# ---------------------------------------------------------------------------------------------------------- Muon


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(0, 40),
    power=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_orthogonalize_is_a_polynomial_of_singular_values(
    shape: tuple[int, int, int], rank: int, power: int, dtype: torch.dtype, seed: int
) -> None:
    """Wide, tall, of any rank and size, and each matrix of a batch by itself.

    Steepest at 0, five steps stretch an error by 3.4445^5 = 485 at most; each of them makes one of about as many
    roundings as a sum has terms, of numbers of size 1.
    """
    torch.manual_seed(seed)
    batch, rows, columns = shape
    x = (10.0**power * torch.randn(batch, rows, rank) @ torch.randn(batch, rank, columns)).to(dtype)
    tolerance = 5 * 485 * (rows + columns) * torch.finfo(dtype).eps / 2
    for given_, found in zip(x, orthogonalize(x), strict=True):
        assert (found.double() - by_svd(given_)).abs().max() <= tolerance


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), seed=st.integers(0, 2**16))
def test_orthogonalize_is_near_the_polar_factor(rows: int, columns: int, seed: int) -> None:
    """Singular values of 0.002 of the norm, and larger, go to 0.68..1.21: the range of five steps' polynomial."""
    torch.manual_seed(seed)
    x = torch.randn(rows, columns, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    polar = u @ vh
    found = orthogonalize(x[None])[0]
    kept = s / s.square().sum().sqrt() >= 0.002
    values = torch.linalg.svdvals(found)
    within = ((values >= 0.68) & (values <= 1.21)).sum()
    assert within >= kept.sum()
    # Along each pair of singular vectors the two are 1 and 0.68..1.21.
    along = (u * found.matmul(vh.mT)).sum(0)
    assert ((along[kept] >= 0.68) & (along[kept] <= 1.21)).all()
    assert torch.allclose((u * polar.matmul(vh.mT)).sum(0), torch.ones_like(s))


def of_textbook(
    config: ModelConfig, start: dict[str, Tensor], gradients: list[dict[str, Tensor]], *, lr: float, muon: bool
) -> dict[str, Tensor]:
    """The parameters after the steps, each projection by itself: Muon with Nesterov's momentum, AdamW for the rest."""
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    found = {}
    for name, p in start.items():
        p, first, second = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
        decay = 0.1 if p.ndim == 2 else 0.0
        pieces = {"qkv.weight": [query, kv, kv], "gate_up.weight": [config.d_ff] * 2}.get(name.split(".", 3)[-1])
        for t, of_step in enumerate(gradients, 1):
            g = of_step[name]
            p *= 1 - lr * decay
            if muon and name.startswith("blocks.") and p.ndim == 2:
                first = 0.95 * first + 0.05 * g
                update = 0.05 * g + 0.95 * first
                for part, target in zip(update.split(pieces or len(p)), p.split(pieces or len(p)), strict=True):
                    target -= lr * 0.2 * max(part.shape) ** 0.5 * by_svd(part)
            else:
                first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g * g
                p -= lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        found[name] = p
    return found


@settings(max_examples=12)
@given(config=configs(), name=st.sampled_from(OPTIMIZERS), capturable=st.booleans(), seed=st.integers(0, 2**16))
def test_steps_are_those_of_the_textbook(config: ModelConfig, name: str, capturable: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Transformer.build(config, dtype=torch.float64)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients = [{key: torch.randn_like(p) for key, p in start.items()} for _ in range(3)]
    optimizer = make_optimizer(model, name, lr=2.0**-7, capturable=capturable)  # exact as a tensor in fp32, too
    for of_step in gradients:
        optimizer.zero_grad()
        for key, p in model.named_parameters():
            p.grad = of_step[key].clone()
        optimizer.step()
    expected = of_textbook(config, start, gradients, lr=2.0**-7, muon=name == "muon")
    for key, p in model.named_parameters():
        # fp64, a few hundred roundings, stretched by 485 in Muon's polynomial; lr's tensor is fp32, and so are the
        # factors made from it: three times two, each off by 2^-24 of a parameter of 2 at most.
        atol = 1e-9 + (6 * 2**-24 * 2 if capturable else 0)
        torch.testing.assert_close(p.detach(), expected[key], rtol=0, atol=atol)


def test_an_update_has_the_size_of_adamws() -> None:
    """RMS 0.2 times lr, between 0.68 and 1.21 times that where no singular value is near 0."""
    torch.manual_seed(0)
    model = Transformer(preset("nano"))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = make_optimizer(model, "muon", lr=1.0, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for key, p in model.named_parameters():
        if "momentum_buffer" in optimizer.state[p]:
            rms = (p.detach() - before[key]).square().mean().sqrt()
            assert 0.2 * 0.6 < rms < 0.2 * 1.3, key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_quadratic_is_minimized(name: str) -> None:
    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = preset("nano")
            self.blocks = nn.ModuleList([nn.Linear(12, 8), nn.Linear(5, 9)])

        def forward(self) -> Tensor:
            return torch.stack([(p - 1).square().sum() for p in self.parameters()]).sum()

    torch.manual_seed(0)
    model = Quadratic()
    optimizer = make_optimizer(model, name, lr=0.3, weight_decay=0.0)
    first = model().item()
    for step in range(200):
        set_lr(optimizer, schedule("wsd", step, 200, decay=150))
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    assert model().item() < 1e-3 * first


# -------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("preset_name", PRESETS)
def test_each_parameter_is_in_the_group_that_it_belongs_to(preset_name: str, name: str) -> None:
    model = Transformer.build(preset(preset_name), device="meta")
    optimizer = make_optimizer(model, name, lr=1e-3, muon_lr=2e-3, weight_decay=0.3)
    groups: dict[Tensor, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            groups.setdefault(p, []).append(group)
    assert len(groups) == len(list(model.parameters()))
    for key, p in model.named_parameters():
        (group,) = groups[p]
        matrix = key.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
        muon = name == "muon" and matrix
        assert group["weight_decay"] == (0.3 if matrix or key.startswith(("embed.", "head.", "positions.")) else 0)
        assert ("momentum" in group) == muon
        assert group["lr"] == group["initial_lr"] == (2e-3 if muon else 1e-3)
        if muon:
            assert (p in optimizer.rows) == key.endswith(("qkv.weight", "gate_up.weight"))
            assert sum(optimizer.rows.get(p, p.shape[:1])) == p.shape[0]


def test_an_unknown_optimizer_is_named_with_the_known() -> None:
    with pytest.raises(ConfigError, match="'sgd': use one of adamw, muon"):
        make_optimizer(Transformer(preset("nano")), "sgd", lr=1.0)


# ------------------------------------------------------------------------------------------- state, clipping, skips


def trained(name: str, capturable: bool = False) -> tuple[Transformer, Optimizer]:
    torch.manual_seed(0)
    model = Transformer(preset("nano"))
    return model, make_optimizer(model, name, lr=3e-3, capturable=capturable)


def step(model: Transformer, optimizer: Optimizer, number: int) -> Tensor:
    tokens = torch.randint(512, (2, 17), generator=torch.Generator().manual_seed(number))
    set_lr(optimizer, schedule("cosine", number, 20, warmup=2))
    optimizer.zero_grad()
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    guard(optimizer, clip(model.parameters(), 1.0))
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_goes_on_bitwise(name: str, capturable: bool) -> None:
    model, optimizer = trained(name, capturable)
    for number in range(3):
        step(model, optimizer, number)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = [step(model, optimizer, number) for number in range(3, 6)]
    other, resumed = trained(name, capturable)
    lrs = [group["lr"] for group in resumed.param_groups]
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert losses == [step(other, resumed, number) for number in range(3, 6)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    if capturable:
        now = [group["lr"] for group in resumed.param_groups]
        assert all(a is b for a, b in zip(lrs, now, strict=True)), "the tensors that a CUDA graph would read"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_finite_gradients_changes_nothing(name: str, bad: float) -> None:
    model, optimizer = trained(name)
    step(model, optimizer, 0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    parameters = list(model.parameters())
    for p in (parameters[0], model.get_parameter("blocks.0.attention.qkv.weight")):
        assert p.grad is not None
        p.grad[0, 0] = bad
        norm = clip(parameters, 1.0)
        assert not norm.isfinite()
        guard(optimizer, norm)
        optimizer.step()
        torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert step(model, optimizer, 1).isfinite()  # and the next one is taken
    assert not torch.equal(model.state_dict()["embed.weight"], before[0]["embed.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaler_scales_nothing_but_the_loss(name: str) -> None:
    """A scale that is a power of two leaves the steps as they were; one too large is a step skipped."""
    plain, scaled = (trained(name) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tokens = torch.randint(512, (2, 17))
    for model, optimizer in (plain, scaled):
        for _ in range(2):
            optimizer.zero_grad()
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            if optimizer is scaled[1]:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
    for p, q in zip(plain[0].parameters(), scaled[0].parameters(), strict=True):
        assert torch.equal(p, q)
    model, optimizer = scaled
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    max_norm=st.sampled_from([None, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_clip(sizes: list[int], max_norm: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    whole = torch.cat([p.grad for p in parameters if p.grad is not None])
    exact = whole.double().norm()
    norm = clip([*parameters, nn.Parameter(torch.zeros(2))], max_norm)  # one without a gradient
    eps = torch.finfo(torch.float32).eps
    assert abs(norm - exact) <= sum(sizes) * eps * exact
    after = torch.cat([p.grad for p in parameters if p.grad is not None])
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (exact.item() + 1e-6))
    assert (after - whole * factor).abs().max() <= (sum(sizes) + 4) * eps * whole.abs().max()


class Waits(TorchDispatchMode):
    """Refuses what brings a value from a device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_waits_for_the_device(name: str) -> None:
    model, optimizer = trained(name, capturable=True)
    step(model, optimizer, 0)
    with Waits():
        guard(optimizer, clip(model.parameters(), 1.0))
        optimizer.step()
    with pytest.raises(AssertionError), Waits():
        clip(model.parameters(), 1.0).item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_a_cuda_graph_obeys_set_lr(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = Transformer.build(preset("nano"), device="cuda")
        optimizer = make_optimizer(model, name, lr=2.0**-8, capturable=True)
        for p in model.parameters():
            p.grad = torch.randn_like(p)

        def one(model: Transformer = model, optimizer: Optimizer = optimizer) -> None:
            guard(optimizer, clip(model.parameters(), 1.0))
            optimizer.step()

        one()
        graph = torch.cuda.CUDAGraph()
        if graphed:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                one()
        for multiplier in (1.0, 0.5, 0.25):
            set_lr(optimizer, multiplier)
            graph.replay() if graphed else one()
        found.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------------- two ranks

RANK = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from tinylm.config import preset
from tinylm.model import Transformer
from tinylm.optim import clip, guard, make_optimizer

dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
mesh = init_device_mesh("cpu", (2,))

def run(sharded):
    torch.manual_seed(0)
    model = Transformer(preset("nano", dim=60, head_dim=16, kv_heads=1, d_ff=37))  # sizes that two ranks do not divide
    if sharded:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, norms = make_optimizer(model, "muon", lr=3e-3), []
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
            if step == 2:
                p.grad.view(-1)[0] = torch.nan  # skipped
            if sharded:
                p.grad = distribute_tensor(p.grad, mesh, p.placements)
        norms.append(clip(model.parameters(), 1e9))
        guard(optimizer, norms[-1])
        optimizer.step()
        if sharded and step == 2:
            set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    return model, optimizer, torch.stack(norms)

(one, _, norms), (two, optimizer, sharded_norms) = run(False), run(True)
torch.testing.assert_close(norms, sharded_norms, rtol=1e-5, atol=0, equal_nan=True)
for (key, p), q in zip(one.named_parameters(), two.parameters()):
    # The same operations on the same numbers, but for where vectors of a loop end: a few roundings of an update.
    torch.testing.assert_close(p, q.full_tensor(), rtol=2**-22, atol=3e-3 * 2**-22, msg=lambda m: key + m)
whole = get_optimizer_state_dict(two, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    kept = {key: set(state) for key, state in whole["state"].items()}
    assert kept.keys() == dict(one.named_parameters()).keys()
    assert kept["embed.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    assert kept["blocks.1.mlp.gate_up.weight"] == {"momentum_buffer"}
loss = two.loss(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
loss.backward()
assert all(p.grad.placements == p.placements for p in two.parameters())
dist.destroy_process_group()
os._exit(0)  # see tinylm.parallel.leave
"""


def test_two_ranks_with_sharded_parameters_step_as_one(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RANK, str(rank), str(tmp_path / "meet")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=300)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:  # one that waits for another which failed
            rank.kill()
            rank.wait()


# --------------------------------------------------------------------------------------------------------- schedules


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    warmup=st.integers(0, 20),
    stable=st.integers(0, 20),
    decay=st.integers(1, 20),
    final=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_a_schedule_rises_stays_and_falls(name: str, warmup: int, stable: int, decay: int, final: float) -> None:
    steps = warmup + stable + decay
    lr = [schedule(name, s, steps, warmup=warmup, decay=decay, final=final) for s in range(steps + 1)]
    assert lr[warmup] == 1.0
    assert lr[steps] == (1.0 if name == "constant" else final)
    assert all(0 < value <= 1 for value in lr[:-1])
    rise = [b - a for a, b in itertools.pairwise(lr[: warmup + 1])]
    assert all(abs(value - 1 / (warmup + 1)) < 1e-12 for value in rise)
    falling = lr[warmup:]
    assert all(b <= a for a, b in itertools.pairwise(falling))
    if name.startswith("wsd"):
        assert set(falling[: stable + 1]) == {1.0}
    # No jump: the steepest is half a cosine's slope, a line's, or the square root's first step.
    slope = {"cosine": math.pi / 2 / (stable + decay), "wsd": 1 / decay, "wsd-sqrt": decay**-0.5, "constant": 0.0}[name]
    assert all(a - b <= slope + 1e-12 for a, b in itertools.pairwise(falling))
    assert schedule(name, steps + 5, steps, warmup=warmup, decay=decay, final=final) == lr[-1]


@pytest.mark.parametrize(
    ("name", "phases", "message"),
    [("linear", {}, "use one of cosine"), ("wsd", {"warmup": 6, "decay": 5}, "fit"), ("cosine", {"warmup": -1}, "fit")],
)
def test_a_schedule_that_cannot_be(name: str, phases: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        schedule(name, 0, 10, **phases)
    assert "\n" not in str(error.value)
