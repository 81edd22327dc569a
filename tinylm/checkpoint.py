"""Checkpoints: a folder for each step, there complete or not at all.

    RUN/step-00001000/model.safetensors   the weights, by the model's own names
                      state.safetensors   the optimizer's tensors, by "<parameter>/<key>"
                      tokenizer.json
                      checkpoint.json     configs, step, digests, versions, and size and sha256 of the files above

A folder is written under a temporary name in RUN, synced to the disk and renamed, so that a kill or a full disk
never leaves half of one under its name. Tensors are safetensors and the rest is JSON: nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.config import CheckpointError, ConfigError, ModelConfig, RopeScaling, first_line
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer

FORMAT = "tinylm checkpoint 1"
MODEL, STATE, TOKENIZER, META = "model.safetensors", "state.safetensors", "tokenizer.json", "checkpoint.json"
FILES = (MODEL, STATE, TOKENIZER)
SPOKEN = (MODEL, TOKENIZER)  # what text needs
NAME = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint, whose files have the sizes and digests that its checkpoint.json names."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """How many optimizer steps it has behind it."""
        return int(self.meta["step"])

    @property
    def config(self) -> ModelConfig:
        """Raises CheckpointError where the fields are not those of this version's ModelConfig."""
        fields = dict(self.meta["model"])
        try:
            if fields.get("rope_scaling") is not None:
                fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
            return ModelConfig(**fields)
        except (TypeError, ConfigError) as error:
            raise CheckpointError(f"{self.path / META}: no model of this version: {error}") from None

    def model_state(self) -> dict[str, Tensor]:
        return _tensors(self.path / MODEL)

    def optimizer_state(self) -> dict[str, Tensor]:
        return _tensors(self.path / STATE)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)


def saved(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    run = Path(run)
    found = [path for path in (run.iterdir() if run.is_dir() else ()) if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def save(
    run: str | Path,
    step: int,
    model_state: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    keep: int,
) -> Path:
    """Writes RUN/step-<step> and then removes all but the last `keep` and the one of lowest meta["val_loss"].

    model_state, state: tensors on any device. meta: JSON; needs "model" (ModelConfig's fields), may have
    "val_loss" (None: not evaluated at this step). Raises CheckpointError where it cannot be written: then
    nothing of it stays, and the earlier ones are as they were.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    run = Path(run)
    path = run / f"step-{step:08d}"
    temporary = run / f"{TEMPORARY}{path.name}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, tensors in ((MODEL, model_state), (STATE, state)):
            save_file({key: t.detach().to("cpu").contiguous() for key, t in tensors.items()}, temporary / name)
        tokenizer.save(temporary)
        files = {name: _fingerprint(temporary / name) for name in FILES}
        content = {"format": FORMAT, "step": step, **meta, "files": files}
        (temporary / META).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        mode = (temporary / META).stat().st_mode
        for name in (*files, META):
            (temporary / name).chmod(mode)  # safetensors makes its files private
            _sync(temporary / name)
        _sync(temporary)
        temporary.rename(path)  # an error where it is there already
        _sync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({first_line(error)}); {left(run)}: make room, then use --resume"
        ) from None
    _prune(run, keep)
    return path


def left(run: str | Path) -> str:
    """What of a run is on the disk, for an error's line."""
    there = saved(run)
    return f"the last good checkpoint is {there[-1]}" if there else "no checkpoint was written yet"


def clean(run: str | Path, keep: int) -> None:
    """Removes what a kill left half-written or half-removed, or kept `save` from removing."""
    run = Path(run)
    for path in run.glob(f"{TEMPORARY}*") if run.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)
    _prune(run, keep)


def load(path: str | Path, which: str = "newest", *, files: Sequence[str] = FILES) -> Checkpoint:
    """The checkpoint in folder `path`, or, if that is a run's folder, its newest or best.

    which: "newest", or "best", of lowest validation loss. files: what is verified. Raises CheckpointError for a
    folder without checkpoint, and for a file that is missing, foreign, or not as long or not the same as when it
    was written.
    """
    path = Path(path)
    if not (path / META).is_file():
        found = saved(path)
        if not found:
            there = "has no checkpoint" if path.is_dir() else "is no folder"
            raise CheckpointError(f"{path}: {there}; expected a run's folder or a step-* folder in one")
        path = (_best(_losses(found)) or found[-1]) if which == "best" else found[-1]
    meta = _read_meta(path)
    for name in files:
        file, expected = path / name, meta["files"][name]
        hint = f"remove {path} to use an earlier one"
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; {hint}")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes instead of {expected['bytes']}; {hint}")
        if _fingerprint(file) != expected:
            raise CheckpointError(f"{file}: its sha256 is not the one in {META}, so it was changed or damaged; {hint}")
    return Checkpoint(path, meta)


def load_model(
    path: str | Path | Checkpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    which: str = "newest",
    ops: Mapping[str, str] | None = None,
) -> tuple[Transformer, dict[str, Any]]:
    """The model, in eval mode, and checkpoint.json of a checkpoint; see `load` for path and which.

    A Checkpoint is as it was loaded; of a path, the optimizer's state is not read. ops: backends, as for
    Transformer. Raises CheckpointError as `load` does.
    """
    found = path if isinstance(path, Checkpoint) else load(path, which, files=SPOKEN)
    with torch.device("meta"):
        model = Transformer(found.config, ops=ops).to(dtype)
    model.to_empty(device=device)
    parameters, stored = dict(model.named_parameters()), found.model_state()
    check(parameters, stored, found.path / MODEL)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
    return model.eval(), found.meta


def check(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor], origin: Path) -> None:
    """Raises CheckpointError, which names `origin`, unless the stored tensors have these names and shapes."""
    if wrong := expected.keys() ^ stored.keys():
        raise CheckpointError(f"{origin}: the tensors are not those of its model: {', '.join(sorted(wrong)[:8])}")
    for name, tensor in expected.items():
        if tensor.shape != stored[name].shape:
            found, shape = list(stored[name].shape), list(tensor.shape)
            raise CheckpointError(f"{origin}: {name} has shape {found}; its model has {shape}")


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise CheckpointError(f"{file}: cannot be read: {first_line(error)}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f'{file}: is of something else; expected JSON with "format": "{FORMAT}"')
    if missing := {"step", "model", "files"} - meta.keys():
        raise CheckpointError(f"{file}: lacks {', '.join(sorted(missing))}")
    if not isinstance(meta["step"], int) or not all(isinstance(meta[name], dict) for name in ("model", "files")):
        raise CheckpointError(
            f"{file}: is of something else; expected a number of steps, and a model and files by name"
        )
    for name in FILES:
        entry = meta["files"].get(name)
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{file}: names no {name} with its bytes and sha256 among its files")
    return meta


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {first_line(error)}") from None


def _losses(paths: Sequence[Path]) -> dict[Path, float]:
    """The validation loss of each checkpoint whose checkpoint.json can be read; infinite where it is no number."""
    losses = {}
    for path in paths:
        with contextlib.suppress(CheckpointError):
            loss = _read_meta(path).get("val_loss")
            losses[path] = loss if isinstance(loss, float | int) and math.isfinite(loss) else math.inf
    return losses


def _best(losses: Mapping[Path, float]) -> Path | None:
    best = min(losses, key=lambda path: losses[path], default=None)
    return best if best is not None and losses[best] < math.inf else None


def _prune(run: Path, keep: int) -> None:
    found = saved(run)
    losses = _losses(found)
    for path in losses.keys() & set(found[:-keep]) - {_best(losses)}:  # what is damaged is not ours to remove
        _remove(path)


def _remove(path: Path) -> None:
    """At once out of sight, then gone: half-removed it would look like a damaged one."""
    hidden = path.with_name(f"{TEMPORARY}removed-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle of a folder to sync
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
