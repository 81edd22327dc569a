"""Training: resuming is exact, whatever stopped the run; what cannot work is said; the flags are the config."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import largest_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import TINY, contents, log, losses, outcome, prepared, settings_of
from torch import Tensor

from tinylm import checkpoint, data, parallel
from tinylm.config import CheckpointError, ConfigError, preset
from tinylm.model import Transformer
from tinylm.optim import make_optimizer
from tinylm.train import Result, TrainConfig, TrainingStopped, feed, peak, train
from tinylm.train import __main__ as command
from tinylm.train.__main__ import flags, main, sweep
from tinylm.train.failures import Diverged
from tinylm.train.feed import batches, evaluate
from tinylm.train.peak import PUBLISHED, peak_flops
from tinylm.train.start import MAY_CHANGE, held
from tinylm.train.step import Step

same_folder = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk: that matters where the power fails, which no test here does."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# --- resuming --------------------------------------------------------------------------------------------------------


@same_folder
@given(
    stop=st.integers(1, 7),
    optimizer=st.sampled_from(["adamw", "muon"]),
    micro=st.sampled_from([0, 1, 2]),
    log_every=st.integers(1, 5),
    dropout=st.sampled_from([0.0, 0.2]),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    stop: int, optimizer: str, micro: int, log_every: int, dropout: float, tokens: str, tmp_path: Path
) -> None:
    for name in ("whole", "parts"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    changed: dict[str, Any] = {
        "optimizer": optimizer, "micro_batch": micro, "dropout": dropout, "log_every": log_every, "save_every": stop,
        "eval_every": 0, "keep": 9,
    }  # fmt: skip
    train(settings_of(tokens, tmp_path / "whole", **changed))
    state = torch.get_rng_state()
    train(settings_of(tokens, tmp_path / "parts", **changed))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own
    for path in checkpoint.saved(tmp_path / "parts"):
        if checkpoint.step_of(path) > stop:
            shutil.rmtree(path)
    train(settings_of(tokens, tmp_path / "parts", **changed, resume=True))
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_killed_at_twenty_points_it_goes_on_bit_for_bit(tokens: str, tmp_path: Path) -> None:
    seed = random.randrange(10**6) if not os.environ.get("CI") else 0
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), tokens, str(tmp_path), str(seed)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["points"]) == 20
    # A run that was to be killed late may have been through already; of those killed by a count, none can.
    assert told["statuses"][:16] == [-9] * 16 and set(told["statuses"]) <= {-9, 0}, (seed, told)
    assert told["resumed"] == [0] * 20, (seed, done.stderr)
    expected = outcome(tmp_path / "whole")
    for number in range(20):
        run = tmp_path / f"killed-{number}"
        assert outcome(run) == expected, (seed, told["points"][number])
        assert [path.name for path in run.glob(".*")] == [".lock"]


def test_a_finished_run_resumes_to_itself_and_to_more_steps(tokens: str, tmp_path: Path) -> None:
    config = settings_of(tokens, tmp_path / "run", schedule="constant")
    first = train(config)
    before = contents(tmp_path)
    again = train(dataclasses.replace(config, resume=True))
    assert contents(tmp_path) == before
    assert (again.val_loss, again.best_val_loss, again.seconds) == (first.val_loss, first.best_val_loss, first.seconds)
    more = train(dataclasses.replace(config, resume=True, steps=12))
    assert [row["step"] for row in log(tmp_path / "run")] == [str(step) for step in range(1, 13)]
    assert more.seconds > first.seconds
    with pytest.raises(ConfigError, match="has 12 behind it"):
        train(dataclasses.replace(config, resume=True, steps=11))


OTHERS = {
    "preset": "tiny", "model": f"{TINY},norm=layernorm", "context": 8, "dropout": 0.5, "batch": 8, "optimizer": "muon",
    "lr": 0.5, "muon_lr": 0.5, "schedule": "wsd", "warmup": 3.0, "decay": 3.0, "final_lr": 0.5, "weight_decay": 0.5,
    "beta1": 0.5, "beta2": 0.5, "clip": 0.5, "seed": 7,
}  # fmt: skip


def test_every_setting_either_may_change_or_is_checked() -> None:
    assert OTHERS.keys() | MAY_CHANGE == {field.name for field in dataclasses.fields(TrainConfig)}
    assert not OTHERS.keys() & MAY_CHANGE


@pytest.fixture(scope="session")
def finished(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(settings_of(tokens, run))
    return run


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_config_is_an_error_that_names_the_field(
    name: str, tokens: str, finished: Path
) -> None:
    before = contents(finished)
    with pytest.raises(ConfigError, match=f"^{name} is .* was trained with"):
        train(settings_of(tokens, finished, resume=True, **{name: OTHERS[name]}))
    assert contents(finished) == before


def test_a_checkpoint_of_another_text_is_an_error(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training text"):
        train(settings_of(prepared(tmp_path, 1000), finished, resume=True))


def test_a_checkpoint_of_no_run_is_an_error(tokens: str, finished: Path, tmp_path: Path) -> None:
    found = checkpoint.load(finished)
    meta = {"model": found.meta["model"]}
    checkpoint.save(tmp_path, 3, found.model_state(), {}, meta, found.tokenizer(), keep=1)
    with pytest.raises(CheckpointError, match="no run to go on with"):
        train(settings_of(tokens, tmp_path, resume=True))


def test_an_optimizer_state_of_another_model_is_an_error(tokens: str, finished: Path, tmp_path: Path) -> None:
    found = checkpoint.load(finished)
    state = {name: value for name, value in found.optimizer_state().items() if "embed" not in name}
    checkpoint.save(tmp_path, 8, found.model_state(), state, found.meta, found.tokenizer(), keep=1)
    with pytest.raises(
        CheckpointError, match=r"state\.safetensors: the tensors are not those .*: embed\.weight/exp_avg"
    ):
        train(settings_of(tokens, tmp_path, resume=True))


def test_a_run_that_is_there_is_not_overwritten(tokens: str, finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(ConfigError, match="up to step 8, and nothing was overwritten: give --resume"):
        train(settings_of(tokens, finished))
    assert contents(finished) == before


def test_steps_may_change_where_the_learning_rate_does_not(tokens: str, tmp_path: Path) -> None:
    config = settings_of(tokens, tmp_path / "cosine")
    train(config)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"steps is 16, .* was to have 8, and by cosine another learning rate"):
        train(dataclasses.replace(config, steps=16, resume=True))
    assert contents(tmp_path) == before

    changed: dict[str, Any] = {"schedule": "wsd", "warmup": 2.0, "decay": 3.0, "save_every": 1, "keep": 9}
    shorter, longer = settings_of(tokens, tmp_path / "wsd", **changed), settings_of(tokens, tmp_path / "12", **changed)
    longer = dataclasses.replace(longer, steps=12)
    train(shorter)
    train(longer)
    resumed = dataclasses.replace(shorter, steps=12, resume=True)
    for step in (8, 7, 6):  # at step 5 the decay of 8 has not begun
        with pytest.raises(ConfigError, match="could go on"):
            train(resumed)
        shutil.rmtree(tmp_path / "wsd" / f"step-{step:08d}")
    train(resumed)
    assert losses(resumed.run) == losses(longer.run)


def test_to_resume_nothing_is_said(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings_of(tokens, tmp_path / "mistyped", resume=True))
    assert f"{tmp_path / 'mistyped'} has no checkpoint: the run starts at its first step" in capsys.readouterr().err


def test_a_run_has_its_folder_alone(tokens: str, tmp_path: Path) -> None:
    with held(tmp_path / "run"), pytest.raises(ConfigError, match="being trained into by another process"):
        train(settings_of(tokens, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    train(settings_of(tokens, tmp_path / "run"))


# --- what stops a run ------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int, Tensor, Tensor], Tensor]], None]]:
    """Puts a fault into the loss: a function of the pass in training, the tokens, and the loss."""

    def plant(fault: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        forward, count = Transformer.forward, itertools.count()

        def faulty(self: Transformer, tokens: Tensor, **options: Any) -> Tensor:
            loss = forward(self, tokens, **options)
            return fault(next(count), tokens, loss) if torch.is_grad_enabled() else loss

        monkeypatch.setattr(Transformer, "forward", faulty)

    yield plant


@pytest.mark.parametrize("log_every", [1, 3, 20])
@pytest.mark.parametrize("bad", [1, 4, 5, 7])
def test_nan_stops_and_says_the_step(bad: int, log_every: int, tokens: str, tmp_path: Path, faulty: Any) -> None:
    faulty(lambda count, _, loss: loss * math.nan if count == bad - 1 + 2 else loss)  # two steps to warm up
    config = settings_of(tokens, tmp_path, log_every=log_every)
    with pytest.raises(TrainingStopped, match=f"loss is nan at step {bad};") as caught:
        train(config)
    there = [checkpoint.step_of(path) for path in checkpoint.saved(tmp_path)]
    assert there == ([4] if bad > 4 else [])
    assert ("step-00000004" if there else "no checkpoint") in str(caught.value)
    if there:
        assert all(bool(value.isfinite().all()) for value in checkpoint.load(tmp_path).model_state().values())


@pytest.mark.parametrize("steps", [1, 3])
def test_a_validation_that_is_no_number_stops_before_it_is_saved(steps: int, tokens: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"validation loss is nan after step 1; no checkpoint .* lower --lr"):
        train(settings_of(tokens, tmp_path, lr=1e12, clip=0.0, warmup=0.0, eval_every=1, steps=steps))
    assert not checkpoint.saved(tmp_path)


def test_broken_weights_are_not_saved(tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Step.__call__

    def broken(self: Step, rows: Tensor) -> None:
        made(self, rows)
        if next(count) == 5:
            self.parameters[0].detach()[0, 0] = math.inf

    count = itertools.count(1)
    monkeypatch.setattr(Step, "__call__", broken)
    with pytest.raises(TrainingStopped, match=r"weights are no numbers after step 5; .* is .*step-00000004"):
        train(settings_of(tokens, tmp_path, save_every=1, eval_every=0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_whose_gradients_are_no_numbers_changes_nothing(bad: float, faulty: Any) -> None:
    faulty(lambda count, _, loss: loss * bad if count == 1 else loss)
    model = Transformer(preset("nano", vocab_size=64, context=32))
    wrapped = parallel.wrap(model, "none", parallel.World(torch.device("cpu")))
    step = Step(
        wrapped, model, make_optimizer(model, "muon", lr=1e-2),
        rows=(4, 33), micro=4, room=3, autocast=torch.float32, clip_norm=1.0,
    )  # fmt: skip
    weights = []
    for _ in range(3):
        step(torch.randint(64, (4, 33)))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))


def test_a_model_that_does_not_fit_is_told(tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> Transformer:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Transformer, "build", no_room)
    with pytest.raises(TrainingStopped, match=r"the model, .* do not fit into .* cpu: give a smaller"):
        train(settings_of(tokens, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_fits_is_tried_beside_the_optimizers_state(tokens: str, tmp_path: Path, faulty: Any) -> None:
    def fault(count: int, tokens: Tensor, loss: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    def fits(self: Step, micro: int) -> bool:
        return all("exp_avg" in self.optimizer.state[p] for p in self.parameters)

    faulty(fault)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingStopped, match="2 did"):
        patch.setattr(Step, "fits", fits)
        train(settings_of(tokens, tmp_path))


@pytest.mark.parametrize(
    ("fits", "told"), [(7, "6 did"), (6, "6 did"), (3, "3 did"), (1, "1 did"), (0, "nor does one")]
)
def test_what_does_not_fit_names_the_largest_that_does(
    fits: int, told: str, tokens: str, tmp_path: Path, faulty: Any
) -> None:
    def fault(count: int, tokens: Tensor, loss: Tensor) -> Tensor:
        if len(tokens) > fits:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return loss

    faulty(fault)
    with pytest.raises(TrainingStopped, match=told):
        train(settings_of(tokens, tmp_path, batch=12))
    if fits:
        micro = int(told.split()[0])
        assert train(settings_of(tokens, tmp_path / "again", batch=12, micro_batch=micro)).steps == 8


def test_a_full_disk_leaves_the_last_checkpoint(tokens: str, tmp_path: Path) -> None:
    config = settings_of(tokens, tmp_path / "run", keep=9, schedule="constant")
    train(dataclasses.replace(config, steps=4))
    good = contents(tmp_path / "run" / "step-00000004")
    with largest_file(10_000), pytest.raises(CheckpointError, match="cannot be written") as caught:
        train(dataclasses.replace(config, resume=True))
    assert "step-00000004" in str(caught.value)
    assert [path.name for path in checkpoint.saved(tmp_path / "run")] == ["step-00000004"]
    assert contents(tmp_path / "run" / "step-00000004") == good
    assert not list((tmp_path / "run").glob(f"{checkpoint.TEMPORARY}*"))
    train(dataclasses.replace(config, resume=True))
    assert checkpoint.load(tmp_path / "run").step == 8


@pytest.mark.parametrize(("size", "steps"), [(50, 0), (700, 4)])
def test_a_log_that_cannot_be_written_is_told(
    size: int,
    steps: int,
    tokens: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],  # which keeps stderr in memory, rather than in a file
) -> None:
    config = settings_of(tokens, tmp_path / "run", schedule="constant", steps=max(steps, 1))
    if steps:
        train(config)
    with largest_file(size), pytest.raises(CheckpointError, match=r"log\.csv: the log cannot be written") as caught:
        train(dataclasses.replace(config, steps=8, resume=True))
    assert ("step-00000004" if steps else "no checkpoint was written yet") in str(caught.value)
    train(dataclasses.replace(config, steps=8, resume=True))
    assert len(losses(tmp_path / "run")) == 8


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="run cannot be the run's folder"):
        train(settings_of("no-such-text", tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps is 0"),
    ({"lr": 0.0}, "lr is 0.0"),
    ({"lr": math.nan}, "lr is nan"),
    ({"beta2": 1.0}, "beta2 is 1.0"),
    ({"clip": -1.0}, "clip is -1.0"),
    ({"preset": "huge"}, "unknown preset 'huge'"),
    ({"model": "dim"}, "expected name=value"),
    ({"model": "width=3"}, "ModelConfig has no width"),
    ({"model": "dim=wide"}, "dim is 'wide'"),
    ({"model": "tied=maybe"}, "tied is 'maybe': expected true or false"),
    ({"model": "norm_eps=a"}, "norm_eps is 'a': expected a number"),
    ({"model": "init_std=inf"}, "init_std is 'inf'"),
    ({"model": "rope_scaling=3"}, "rope_scaling cannot be given here"),
    ({"seed": 10**22}, "less than 2"),
    ({"batch": 10**22}, "batch is 1.*less than 2"),
    ({"final_lr": math.inf}, "final_lr is inf"),
    ({"model": f"{TINY},vocab_size=3"}, "less than the tokenizer's"),
    ({"preset": "gpt2-124m", "context": 2048}, "longer than the 1024 learned positions"),
    ({"dropout": 1.5}, "dropout is 1.5"),
    ({"warmup": 9.0}, "do not fit into 8 steps"),
    ({"rmsnorm": "fast"}, "unknown backend 'fast' of rmsnorm"),
    ({"linear_cross_entropy": "fast"}, "unknown backend 'fast' of linear_cross_entropy"),
    ({"micro_batch": 3}, "micro_batch 3 does not divide the 4 sequences"),
    ({"dtype": "fp16"}, "fp16 is for GPUs"),
    ({"graph": True}, "graph is for one process on a CUDA device"),
    ({"device": "tpu"}, "device 'tpu'"),
    ({"device": "mps"}, "use cpu, cuda, or cuda:N"),
    ({"device": "cuda:99"}, "use one of them, or --device cpu"),
    ({"parallel": "ddp"}, "torchrun --standalone"),
    ({"data": "no-such-text"}, "'no-such-text' is no file or folder and no source"),
    ({"context": 10_000}, "fewer than one window"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[next(iter(changed)) for changed, _ in BAD])
def test_what_cannot_work_is_one_clear_line(changed: dict[str, Any], message: str, tokens: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train(settings_of(tokens, tmp_path / "run", **changed))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False), ("False", False)])
def test_an_override_is_of_its_fields_type(text: str, value: bool) -> None:
    shape = TrainConfig(model=f"bias={text}, tied={text},dim=32,norm_eps=1e-3,mlp=gelu").shape()
    assert shape.bias is shape.tied is value
    assert (shape.dim, shape.norm_eps, shape.mlp) == (32, 1e-3, "gelu")


@pytest.mark.parametrize("name", ["stdlib", "tinyshakespeare", "tinystories"])
def test_data_may_be_a_source(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def prepare(source: str, **settings: Any) -> Path:
        asked.append((source, settings))
        return Path("made")

    monkeypatch.setattr(feed, "prepare", prepare)
    assert feed.prepared(TrainConfig(data=name, tokenizer="bpe", vocab_size=300)) == Path("made")
    assert asked == [(name, {"tokenizer": "bpe", "vocab_size": 300, "progress": False})]


@pytest.mark.parametrize("content", ["", "a", "ab" * 20])
def test_a_text_that_is_too_short_is_an_error(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(ConfigError):
        train(settings_of(str(tmp_path / "text.txt"), tmp_path / "run", tokenizer="char"))
    assert not (tmp_path / "run").exists()


# --- what a run does -------------------------------------------------------------------------------------------------


def test_the_loss_of_passes_is_that_of_the_whole_batch(tokens: str, tmp_path: Path) -> None:
    for micro in (0, 1, 2):
        train(settings_of(tokens, tmp_path / str(micro), micro_batch=micro))
    whole, *others = (losses(tmp_path / str(micro)) for micro in (0, 1, 2))
    for other in others:
        # Sums of 64 terms in another order, in fp32: 64 units in the last place, and Adam's first steps, which divide
        # a gradient by its own size, pass on a relative error and no more.
        assert other == pytest.approx(whole, rel=64 * 2**-23 * len(whole))


def test_the_log_has_every_step_once_and_the_learning_rate_of_the_schedule(tokens: str, tmp_path: Path) -> None:
    config = settings_of(tokens, tmp_path, log_every=3, steps=10, schedule="wsd", warmup=2, decay=3)
    result = train(config)
    rows = log(tmp_path)
    assert [int(row["step"]) for row in rows] == [3, 4, 6, 8, 9, 10]
    for row in rows:
        assert int(row["tokens"]) == int(row["step"]) * 64
        assert float(row["lr"]) == config.lr * config.lr_share(int(row["step"]) - 1)
        assert bool(row["val_loss"]) == (row["step"] in ("4", "8", "10"))
    assert float(rows[-1]["val_loss"]) == result.val_loss
    assert float(rows[-1]["perplexity"]) == pytest.approx(math.exp(float(rows[-1]["val_loss"])))
    assert result.tokens_per_s == pytest.approx(10 * 64 / result.seconds)


def test_a_row_is_the_mean_of_its_steps(tokens: str, tmp_path: Path) -> None:
    train(settings_of(tokens, tmp_path / "each", log_every=1, eval_every=0))
    train(settings_of(tokens, tmp_path / "both", log_every=2, eval_every=0))
    each = losses(tmp_path / "each")
    assert losses(tmp_path / "both") == [(a + b) / 2 for a, b in zip(each[::2], each[1::2], strict=True)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_warming_up_leaves_the_state_unspoiled(
    optimizer: str, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    changed: dict[str, Any] = {"optimizer": optimizer, "dropout": 0.2}
    assert train(settings_of(tokens, warm, **changed)).compile_seconds > 0
    with monkeypatch.context() as patch:
        patch.setattr(Step, "warm_up", lambda *_: None)
        train(settings_of(tokens, cold, **changed))
        assert outcome(warm) == outcome(cold)
        # A checkpoint's tensors go into those that the warm-up made, or into new ones.
        for run in (cold, warm):
            shutil.rmtree(run / "step-00000008")
        train(settings_of(tokens, cold, **changed, resume=True))
    train(settings_of(tokens, warm, **changed, resume=True))
    assert outcome(warm) == outcome(cold)


@same_folder
@given(context=st.integers(1, 40), batch=st.integers(1, 5), length=st.integers(0, 150), limit=st.integers(0, 60))
def test_evaluation_scores_every_position_once(
    context: int, batch: int, length: int, limit: int, tokens: str, tmp_path: Path
) -> None:
    split = data.Tokens(Path(tokens), "val")
    vocab = split.vocab_size
    nats = torch.rand(vocab, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.arange(vocab)

    def score(inputs: Tensor, targets: Tensor) -> Tensor:
        wanted = targets >= 0
        return nats[inputs[wanted], targets[wanted]].mean()

    loss, bits = evaluate(score, split, sizes, context=context, batch=batch, limit=limit, device=torch.device("cpu"))
    every = torch.from_numpy(split.read(np.array([0]), len(split))[0])
    scored = len(every) - 1
    if limit:
        scored = min(scored, limit)
    known, wanted = every[:scored], every[1 : scored + 1]
    total = float(nats[known, wanted].sum())
    # Sums of up to thousands of doubles in another order.
    assert loss == pytest.approx(total / scored, rel=1e-12)
    assert bits == pytest.approx(total / math.log(2) / int(sizes[wanted].sum()), rel=1e-12)


@same_folder
@given(ranks=st.sampled_from([1, 2, 4]), steps=st.integers(0, 9), start=st.integers(0, 5))
def test_ranks_take_slices_of_the_same_batch(ranks: int, steps: int, start: int, tokens: str) -> None:
    sampler = data.Sampler(data.Tokens(Path(tokens), "train"), 16, seed=3)
    each = [
        list(batches(sampler, range(start, start + steps), batch=8, first=r * 8 // ranks, count=8 // ranks, pin=False))
        for r in range(ranks)
    ]
    for index in range(steps):
        joined = torch.cat([rows[index] for rows in each])
        assert torch.equal(joined, sampler.samples((start + index) * 8, 8))


def test_nano_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model = Transformer(preset("nano", vocab_size=64, context=32))
    rows = torch.randint(64, (4, 33))
    optimizer = make_optimizer(model, "adamw", lr=1e-2, weight_decay=0.0)
    world = parallel.World(torch.device("cpu"))
    step = Step(
        parallel.wrap(model, "none", world), model, optimizer,
        rows=(4, 33), micro=4, room=150, autocast=torch.float32, clip_norm=1.0,
    )  # fmt: skip
    for _ in range(150):
        step(rows)
    made, _ = step.read()
    assert len(made) == 150 and made[0] > math.log(64) - 0.5  # random tokens can be learned by heart alone
    assert made[-1] < 0.05


@pytest.mark.skipif(not os.environ.get("TINYLM_TEST_DATA"), reason="TINYLM_TEST_DATA names no folder of real text")
def test_a_short_shakespeare_run_goes_below_two_and_a_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    shakespeare = Path(os.environ["TINYLM_TEST_DATA"]) / "tinyshakespeare.txt"
    result = train(
        TrainConfig(
            data=str(shakespeare), tokenizer="char", preset="nano", context=64, batch=16, steps=200, lr=3e-3,
            eval_every=0, eval_tokens=20_000, device="cpu", out=str(tmp_path / "run"),
        )
    )  # fmt: skip
    assert result.val_loss is not None and result.val_loss < 2.5


def test_the_checkpoint_is_the_model_that_was_validated(tokens: str, finished: Path) -> None:
    model, meta = checkpoint.load_model(finished, which="best")
    split = data.Tokens(Path(tokens), "val")
    sizes = torch.from_numpy(checkpoint.load(finished).tokenizer().token_bytes())

    def score(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return model.loss(inputs, targets)

    loss, _ = evaluate(score, split, sizes, context=16, batch=4, limit=64, device=torch.device("cpu"))
    assert loss == meta["val_loss"] == meta["best"]["val_loss"]


def test_the_peak_is_published_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert rate > 0 and source == "measured"
    named = {
        "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-40GB": 312e12, "A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 2070": 29.9e12,
    }  # fmt: skip
    for name, rate in named.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        peak_flops.cache_clear()
        assert peak_flops(torch.device("cuda"), torch.float16) == (rate, "published")
    assert set(named.values()) <= set(PUBLISHED.values())
    monkeypatch.setattr(peak, "_measured", lambda *_: 1.0)
    for other in ("NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 NVL"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=other: name)
        peak_flops.cache_clear()
        assert peak_flops(torch.device("cuda"), torch.float16) == (1.0, "measured"), other
    peak_flops.cache_clear()


# --- the command -----------------------------------------------------------------------------------------------------


def arguments(tokens: str, *more: str) -> list[str]:
    given = ["--data", tokens, "--model", TINY, "--context", "16", "--batch", "4", "--steps", "4", "--device", "cpu"]
    return [*given, "--eval-tokens", "64", "--peak-flops", "1e9", *more]


def test_no_flags_are_the_default_config() -> None:
    assert sweep(flags([])) == {"": TrainConfig()}


def test_values_expand_to_runs_with_one_table(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    more = ["--lr", "1e-3", "1e30", "--optimizer", "adamw", "muon", "--clip", "0", "--out", str(out)]
    assert main(arguments(tokens, *more)) == 2  # of one learning rate, nothing can come
    told = capsys.readouterr()
    names = [f"optimizer={name},lr={lr}" for name in ("adamw", "muon") for lr in ("0.001", "1e+30")]
    with (out / "sweep.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == names
    for name, row in rows.items():
        assert name in told.out
        assert bool(row["error"]) == ("1e+30" in name) == (row["val_loss"] == "")
        assert (out / name / "log.csv").is_file()
        assert float(row["lr"]) in (1e-3, 1e30) and row["steps"] == "4"
    assert told.err.count("error: ") == 2
    assert {field.name for field in dataclasses.fields(Result)} <= rows[names[0]].keys()


def test_the_end_says_how_to_go_on(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a run"
    assert main(arguments(tokens, "--eval-every", "2", "--out", str(run))) == 0
    told = capsys.readouterr()
    assert f"python -m tinylm.generate --checkpoint '{run}'" in told.out
    rows = [row for row in log(run) if row["val_loss"]]
    assert [line.split("  ")[:3] for line in told.err.splitlines()] == [
        [f"step {row['step']} of 4", f"loss {float(row['train_loss']):.4f}", f"val {float(row['val_loss']):.4f}"]
        for row in rows
    ]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("error", [ConfigError("alone"), TrainingStopped("alone"), Diverged("all")])
def test_a_sweep_goes_on_unless_ranks_might_wait(
    error: Exception, size: int, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tried = []

    def fails(config: TrainConfig) -> Result:
        tried.append(config.lr)
        raise error

    world = parallel.World(torch.device("cpu"), 0, size)
    monkeypatch.setattr(command, "train", fails)
    monkeypatch.setattr(parallel, "ranks", lambda *_: contextlib.nullcontext(world))
    monkeypatch.setattr(parallel.World, "first", lambda self, make: make())
    (tmp_path / "sweep").mkdir()
    assert main(arguments(tokens, "--lr", "1e-3", "1e-4", "--out", str(tmp_path / "sweep"))) == 2
    assert len(tried) == (1 if size == 2 and not isinstance(error, Diverged) else 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--lr", "1e-3", "1e-3"], "twice"),
        (["--out", "a", "b"], "give one folder"),
        (["--lr"], "--lr has no value"),
    ],
)
def test_errors_are_a_line_and_a_status(
    more: list[str], message: str, tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments(tokens, *more)) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1 and message in told.err
    assert not list(tmp_path.iterdir())


def test_every_flag_has_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in told
    for meaning in ("order of samples, and dropout", "Over the ranks that torchrun", "forward and backward pass"):
        assert meaning in " ".join(told.replace("│", " ").split())


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_graph_trains_as_the_steps_it_was_captured_from(
    optimizer: str, dropout: float, tokens: str, tmp_path: Path
) -> None:
    changed: dict[str, Any] = {"optimizer": optimizer, "dropout": dropout, "device": "cuda", "micro_batch": 2}
    for name, graph in (("plain", False), ("graph", True)):
        train(settings_of(tokens, tmp_path / name, **changed, dtype="fp32", graph=graph))
    # The same kernels on the same numbers; atomic adds of the embedding's gradient come in any order.
    assert losses(tmp_path / "graph") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    shutil.rmtree(tmp_path / "graph" / "step-00000008")
    train(settings_of(tokens, tmp_path / "graph", **changed, dtype="fp32", graph=True, resume=True))
    assert losses(tmp_path / "graph") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


HALVES = [("cpu", "bf16"), ("cuda", "bf16"), ("cuda", "fp16")]


@pytest.mark.parametrize(("device", "dtype"), HALVES, ids="-".join)
def test_half_precision_trains_near_fp32(device: str, dtype: str, tokens: str, tmp_path: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for name in ("fp32", dtype):
        train(settings_of(tokens, tmp_path / name, device=device, dtype=name))
    # A loss near 3 from logits of about 1, which have an error of 2^-8 of that after each of a few products.
    assert losses(tmp_path / dtype) == pytest.approx(losses(tmp_path / "fp32"), abs=2**-5)
