"""Two ranks train as one process does: gloo on the CPU, started by torchrun as a user would."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import log, losses, prepared, settings_of

from tinylm import checkpoint, parallel
from tinylm.config import ConfigError
from tinylm.train import TrainConfig, train
from tinylm.train.start import rows_of_a_rank

STEPS = 52
CLIP = 0.3  # of norms that are larger at first
KINDS = ("ddp", "fsdp")


def torchrun(*arguments: str) -> None:
    """Runs a program on two ranks of one thread each; the timeout is for ranks that wait for each other."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def config(tokens: str, out: Path, **changed: Any) -> TrainConfig:
    return settings_of(
        tokens, out, **{"batch": 8, "steps": STEPS, "eval_every": 26, "keep": 9, "lr": 1e-2, "clip": CLIP, **changed}
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def one(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process: whole batches, and batches in two passes."""
    folder = tmp_path_factory.mktemp("one")
    train(config(tokens, folder / "whole"))
    train(config(tokens, folder / "passes", micro_batch=4))
    return folder


@pytest.fixture(scope="module")
def tolerance(one: Path) -> float:
    """How far apart losses, and norms of gradients, may be that differ by the order of their sums alone.

    Two ranks add the gradients of two halves of a batch, as two passes of one process do; what that does to the
    loss in STEPS steps of this very model shows beside whole batches, and at least a rounding of the loss. The
    ranks round at other places, and fsdp at more of them: ten times as much. A defect must be far beyond.
    """
    clipped = [float(row["grad_norm"]) > CLIP for row in log(one / "whole")]
    assert any(clipped) and not all(clipped)
    return 10 * max(apart(one / "whole", one / "passes"), max(losses(one / "whole")) * 2**-23)


@pytest.fixture(scope="module")
def two(one: Path, tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, by the command, with a sweep over the kinds; then what a user would do next, and defects."""
    folder = tmp_path_factory.mktemp("two")
    given = []
    for name, value in dataclasses.asdict(config(tokens, folder, micro_batch=2)).items():
        if name != "parallel" and value != getattr(TrainConfig(), name):
            given += [f"--{name.replace('_', '-')}", str(value)]
    torchrun("-m", "tinylm.train", *given, "--parallel", *KINDS)

    shutil.copytree(tokens, folder / "copy")
    runs: list[dict[str, Any]] = []
    for kind in KINDS:
        shutil.copytree(one / "whole", folder / f"resumed-{kind}")
        shutil.rmtree(folder / f"resumed-{kind}" / f"step-{STEPS:08d}")
        # The second rank as on another machine: without the checkpoint, and with the same text elsewhere.
        resumed = dataclasses.asdict(config(tokens, folder / f"resumed-{kind}", parallel=kind, resume=True))
        runs.append({**resumed, "other": {"data": str(folder / "copy"), "out": str(folder / f"elsewhere-{kind}")}})
        defect = config(tokens, folder / f"defect-{kind}", parallel=kind)
        runs.append({**dataclasses.asdict(defect), "sabotage": True})
    muon = config(tokens, folder / "muon-fsdp", parallel="fsdp", optimizer="muon", steps=4)
    runs.append(dataclasses.asdict(muon))
    another = prepared(folder, seed=1)
    cannot = dataclasses.asdict(config(tokens, folder / "cannot", parallel="ddp"))
    runs.append({**cannot, "other": {"data": another}, "error": "training text has sha256 .* on rank 1, and .* on the"})
    runs.append({**cannot, "batch": 16, "room": 3, "error": "8 sequences .* do not fit .* cpu, 2 did"})
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(str(Path(__file__).with_name("ranks.py")), str(folder / "runs.json"))
    return folder


def apart(a: Path, b: Path) -> float:
    """The most by which losses, or norms of gradients, differ: of numbers near 3, and between 0.1 and 1."""
    first, second = log(a), log(b)
    assert len(first) == len(second) == STEPS
    columns = ("train_loss", "grad_norm")
    return max(abs(float(x[key]) - float(y[key])) for x, y in zip(first, second, strict=True) for key in columns)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_have_the_losses_of_one_process(kind: str, one: Path, two: Path, tolerance: float) -> None:
    assert apart(two / f"parallel={kind}", one / "whole") <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_reduction_would_show(kind: str, one: Path, two: Path, tolerance: float) -> None:
    assert apart(two / f"defect-{kind}", one / "whole") > 1000 * tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_one_process_resumes_on_two(kind: str, one: Path, two: Path, tolerance: float) -> None:
    assert apart(two / f"resumed-{kind}", one / "whole") <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_ranks_resumes_on_one(
    kind: str,
    one: Path,
    two: Path,
    tolerance: float,
    tokens: str,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two / f"parallel={kind}", run)
    shutil.rmtree(run / f"step-{STEPS:08d}")
    train(config(tokens, run, resume=True))
    assert apart(run, one / "whole") <= tolerance
    whole, resumed = (checkpoint.load(folder).model_state() for folder in (one / "whole", run))
    assert whole.keys() == resumed.keys()


def test_muon_under_fsdp_is_muon(two: Path, tokens: str, tmp_path: Path, tolerance: float) -> None:
    train(config(tokens, tmp_path, optimizer="muon", steps=4))
    assert losses(two / "muon-fsdp") == pytest.approx(losses(tmp_path), abs=tolerance)


@pytest.mark.parametrize(
    ("kind", "environment", "message"),
    [
        ("ddp", {}, "torchrun --standalone"),
        ("none", {"RANK": "0", "WORLD_SIZE": "2"}, "give --parallel ddp or fsdp"),
        ("tensor", {}, "unknown parallel 'tensor'"),
    ],
)
def test_what_does_not_fit_the_launcher_is_an_error(
    kind: str, environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), parallel.ranks(kind, "cpu"):
        pass


def test_a_batch_that_the_ranks_cannot_share_is_an_error() -> None:
    world = parallel.World(torch.device("cpu"), 0, 3)
    with pytest.raises(ConfigError, match="batch 16 is no multiple of the 3 ranks"):
        rows_of_a_rank(TrainConfig(), world, torch.float32)
    with pytest.raises(ConfigError, match="does not divide the 5 sequences of a rank"):
        rows_of_a_rank(TrainConfig(batch=15, micro_batch=2), world, torch.float32)
