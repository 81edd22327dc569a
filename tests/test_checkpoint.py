"""A checkpoint is there whole or not at all, comes back bit for bit, and is told from anything else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import largest_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import contents
from strategies import configs
from torch import Tensor

from tinylm import checkpoint
from tinylm.config import CheckpointError, ModelConfig, preset
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer, train_char

FILES = (checkpoint.MODEL, checkpoint.STATE, checkpoint.TOKENIZER, checkpoint.META)
SMALL = preset("nano", vocab_size=32, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, d_ff=16, context=16)
same_folder = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk: that matters where the power fails, which no test here does."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_char(["some text"])


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: p.detach() for name, p in Transformer(config).named_parameters()}


def save(run: Path, step: int, tokenizer: Tokenizer, config: ModelConfig = SMALL, **settings: Any) -> Path:
    weights = tensors(config)
    state = {f"{name}/exp_avg": torch.full_like(tensor, step) for name, tensor in weights.items()}
    meta = {"model": dataclasses.asdict(config), "val_loss": settings.pop("val_loss", None)}
    return checkpoint.save(run, step, weights, state, meta, tokenizer, **{"keep": 3, **settings})


@same_folder
@given(config=configs(), step=st.integers(0, 10**9))
def test_what_is_saved_comes_back_bit_for_bit(config: ModelConfig, step: int, tmp_path: Path) -> None:
    tokenizer = train_char(["some text"])
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    path = save(tmp_path / "run", step, tokenizer, config)
    model, meta = checkpoint.load_model(tmp_path / "run")
    assert model.config == config and not model.training and meta["step"] == step
    for name, tensor in tensors(config).items():
        assert torch.equal(dict(model.named_parameters())[name], tensor)
    found = checkpoint.load(path)
    assert found.step == step and found.config == config and found.tokenizer().digest == tokenizer.digest
    assert all(bool((value == step).all()) for value in found.optimizer_state().values())


saves = st.lists(
    st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf, -math.inf])), min_size=1, max_size=7
)


@same_folder
@given(losses=saves, keep=st.integers(1, 3))
def test_the_last_and_the_best_are_kept(losses: list[float | None], keep: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    tokenizer = train_char(["some text"])
    kept: dict[int, float | None] = {}
    for step, loss in enumerate(losses):
        save(run, step, tokenizer, val_loss=loss, keep=keep)
        kept[step] = loss
        best = min((s for s in kept if math.isfinite(kept[s] or math.nan)), key=lambda s: kept[s], default=None)  # type: ignore[arg-type,return-value]
        kept = {s: kept[s] for s in kept if s > step - keep or s == best}
        assert [checkpoint.step_of(path) for path in checkpoint.saved(run)] == sorted(kept)
    if best is not None:
        assert checkpoint.load(run, "best").step == best
    assert checkpoint.load(run).step == len(losses) - 1
    assert not list(run.glob(".*"))


@same_folder
@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), flip=st.booleans())
def test_a_damaged_file_is_an_error_that_names_it(name: str, share: float, flip: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if not run.exists():
        save(run, 1, train_char(["some text"]))
    path = run / "step-00000001" / name
    good = path.read_bytes()
    place = int(share * len(good))
    try:
        if flip and name != checkpoint.META:  # a changed letter of JSON may well be another checkpoint.json
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        else:
            path.write_bytes(good[: min(place, len(good) - 2)])  # the last is a newline, and not missed
        with pytest.raises(CheckpointError, match=name) as caught:
            checkpoint.load(run)
        assert "\n" not in str(caught.value)
    finally:
        path.write_bytes(good)
    assert checkpoint.load(run).step == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ["model.safetensors"]}, "is of something else"),
        ({"files": dict.fromkeys(checkpoint.FILES, 1)}, "names no"),
        ({"model": 3}, "is of something else"),
        ({"step": "two"}, "is of something else"),
        ({"format": "another"}, "is of something else"),
        ({"files": {}}, "names no"),
        ({"model": {"vocab_size": 3}}, "no model of this version"),
        ({"model": {**dataclasses.asdict(SMALL), "dim": 32, "head_dim": 16}}, "has shape"),
        ({"model": {**dataclasses.asdict(SMALL), "tied": False}}, "head.weight"),
        ({"model": {**dataclasses.asdict(SMALL), "new_field": 1}}, "new_field"),
    ],
)
def test_a_foreign_checkpoint_is_an_error(
    change: dict[str, Any], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    meta = save(tmp_path, 1, tokenizer) / checkpoint.META
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_model(tmp_path)


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        checkpoint.load(tmp_path / "nothing")


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.STATE])
def test_nothing_is_unpickled(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, 1, tokenizer)
    torch.save({"embed.weight": Planted()}, path / name)
    meta = json.loads((path / checkpoint.META).read_text())
    data = (path / name).read_bytes()
    meta["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / checkpoint.META).write_text(json.dumps(meta))
    found = checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        found.model_state() if name == checkpoint.MODEL else found.optimizer_state()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.999])
def test_a_full_disk_leaves_the_last_checkpoint_and_no_part(share: float, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, 1, tokenizer)
    before = contents(tmp_path)
    largest = max(len(data) for data in before.values())
    with largest_file(math.floor(share * largest)), pytest.raises(CheckpointError, match="cannot be written") as caught:
        save(tmp_path, 2, tokenizer)
    assert str(path) in str(caught.value)
    assert contents(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_what_a_kill_left_is_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, 1, tokenizer)
    before = contents(tmp_path)
    shutil.copytree(path, tmp_path / f"{checkpoint.TEMPORARY}step-00000002")
    assert checkpoint.load(tmp_path).step == 1
    checkpoint.clean(tmp_path, keep=1)
    assert contents(tmp_path) == before


def test_a_damaged_older_checkpoint_stops_nothing_and_stays(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = [save(tmp_path, step, tokenizer, keep=9, val_loss=1.0 + step) for step in (1, 2, 3)]
    (paths[0] / checkpoint.META).write_text("{")
    before = contents(paths[0])
    assert checkpoint.load(tmp_path, "best").path == paths[1]
    newest = save(tmp_path, 4, tokenizer, keep=1, val_loss=9.0)
    assert checkpoint.saved(tmp_path) == [paths[0], paths[1], newest] and contents(paths[0]) == before


def test_nothing_is_written_over_a_checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, 1, tokenizer)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        save(tmp_path, 1, tokenizer, preset("nano"))
    assert contents(tmp_path) == before


def test_a_model_needs_no_optimizers_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, 1, tokenizer)
    found = checkpoint.load(path)
    (path / checkpoint.STATE).unlink()
    models = [checkpoint.load_model(given)[0] for given in (tmp_path, path, found)]
    for name, tensor in tensors(SMALL).items():
        assert all(torch.equal(model.get_parameter(name), tensor) for model in models)
    (path / checkpoint.TOKENIZER).write_text("{}")
    with pytest.raises(CheckpointError, match=checkpoint.TOKENIZER):
        checkpoint.load_model(path)
