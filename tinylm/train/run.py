"""One run: data, model and optimizer are put together, and steps made, logged, validated and saved.

A run is a function of its config: the samples, the learning rate and the dropout of a step depend on the seed
and the step alone, so that a resumed run needs the weights, the optimizer's tensors and the step's number, and
goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm import checkpoint, data, parallel
from tinylm.model import Transformer
from tinylm.optim import make_optimizer, set_lr
from tinylm.tokenizer import Tokenizer
from tinylm.train.config import TrainConfig
from tinylm.train.failures import Diverged, not_finite, too_large, with_room
from tinylm.train.feed import batches, check_long_enough, evaluate, prepared
from tinylm.train.log import Bar, Log
from tinylm.train.peak import peak_flops
from tinylm.train.start import check_alike, check_same, dtype_of, held, rows_of_a_rank, to_resume
from tinylm.train.state import gather, restore, state_of
from tinylm.train.step import Step


@dataclass(frozen=True)
class Result:
    """What a run came to. Seconds are of training alone: without compilation, validation and checkpoints."""

    run: Path
    steps: int
    train_loss: float | None  # mean of the log's last interval; None: no step was left to make
    val_loss: float | None  # nats a token, after the last step
    bits_per_byte: float | None
    best_val_loss: float | None
    best_step: int | None
    seconds: float  # over all resumptions
    tokens_per_s: float | None  # of this process's steps
    mfu: float | None  # of this process's steps, as a share of peak_flops on each rank
    compile_seconds: float  # compilation and warm-up
    peak_flops: float
    peak_source: str  # "published", "measured" or "given"
    parameters: int


def train(config: TrainConfig) -> Result:
    """Makes a run, or goes on with it (config.resume), and leaves log.csv and checkpoints in config.run.

    Raises ConfigError for settings that cannot work, CheckpointError for a checkpoint that cannot be read or
    written, TrainingStopped where the loss is no number or the batch does not fit.
    """
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(parallel.ranks(config.parallel, config.device))
        # Weights and dropout draw from torch's own generators, which the caller may use too.
        stack.enter_context(world.own_random())
        world.first(lambda: stack.enter_context(held(config.run)))
        return _Run(config, world).go()


class _Run:
    def __init__(self, config: TrainConfig, world: parallel.World) -> None:
        self.config, self.world = config, world
        self.dtype = dtype_of(config, world.device)
        self.per_rank, self.micro = rows_of_a_rank(config, world, self.dtype)
        before = world.first(lambda: to_resume(config))
        folder = world.first(lambda: prepared(config))
        if not world.main:
            folder = prepared(config)  # there already, but for a machine with a disk of its own
        self.text, self.validation = data.Tokens(folder, "train"), data.Tokens(folder, "val")
        self.sampler = data.Sampler(self.text, config.context, config.seed)
        check_long_enough(self.validation, config.context)
        self.tokenizer = Tokenizer.load(folder)
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes().astype(np.int64))
        self.shape = config.shape(self.tokenizer.vocab_size)
        self.digests = {
            "tokenizer": self.tokenizer.digest,
            "training text": self.text.digest,
            "validation text": self.validation.digest,
        }
        check_alike(world.gathered(self.digests))
        if before is not None:
            check_same(before, self.digests, self.shape)
        elif config.resume and world.main:
            print(f"{config.run} has no checkpoint: the run starts at its first step", file=sys.stderr)
        if world.main:
            checkpoint.clean(config.run, config.keep)

        initial = with_room(
            self._build,
            lambda: (
                f"the model, what its optimizer keeps and a step's tokens do not fit into the memory of {world.device}"
                ": give a smaller --preset, --model or --batch"
            ),
        )
        if config.peak_flops:
            self.peak, self.peak_source = config.peak_flops, "given"
        else:
            self.peak, self.peak_source = peak_flops(world.device, self.dtype)
        self.done, self.seconds = 0, 0.0
        self.best: dict[str, Any] = {}  # step and val_loss of the best validation
        self.newest: dict[str, Any] = {}  # what the newest validation added to its row
        self.compile_seconds = self._warm_up(initial)
        if before is not None:
            self._restore(before)

    # --- its state ---------------------------------------------------------------------------------------------------

    def _build(self) -> list[Tensor]:
        """Makes model, optimizer and step; the initial weights that this rank has, on the host."""
        config, world = self.config, self.world
        torch.manual_seed(config.seed)
        backends = {"rmsnorm": config.rmsnorm, "linear_cross_entropy": config.linear_cross_entropy}
        self.model = Transformer.build(self.shape, ops=backends, device=world.device)
        self.parameter_count = self.model.param_count()
        self.flops = 3 * self.model.flops(config.batch, config.context)  # of a step
        wrapped = parallel.wrap(self.model, config.parallel, world, compiled=config.compile)
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(
            self.model,
            config.optimizer,
            lr=config.lr,
            muon_lr=config.muon_lr or None,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            capturable=config.graph,
        )
        self.step = Step(
            wrapped,
            self.model,
            self.optimizer,
            rows=(self.per_rank, config.context + 1),
            micro=self.micro,
            room=min(config.log_every, config.steps),
            autocast=self.dtype,
            clip_norm=config.clip or None,
            graph=config.graph,
        )
        self.optimizer.allocate()
        self.state = state_of(self.optimizer, self.weights)
        return [parallel.local(weight.detach()).to("cpu", copy=True) for weight in self.weights.values()]

    def _warm_up(self, initial: list[Tensor]) -> float:
        """Compiles, captures, loads kernels outside the clock, and leaves the state as it was; the seconds it took."""
        # Each run compiles anew: torch counts how often it compiles the same code, and gives up at the eighth time.
        if self.config.compile:
            torch.compiler.reset()
        scaler = self.step.scaler.state_dict()
        started = time.perf_counter()
        self._guarded(lambda: self.step.warm_up(self.sampler.samples(0, self.per_rank)), 1)
        took = time.perf_counter() - started
        # In place, because a graph has their addresses; zeros are what the optimizers start from.
        with torch.no_grad():
            for weight, value in zip(self.weights.values(), initial, strict=True):
                parallel.local(weight).copy_(value)
        for value in self.state.values():
            value.zero_()
        self.step.scaler.load_state_dict(scaler)
        return took

    def _restore(self, before: checkpoint.Checkpoint) -> None:
        restore(self.weights, self.state, before, self.world)
        self.done, self.seconds = before.step, before.meta["seconds"]
        self.best, self.newest = before.meta["best"], before.meta["newest"]
        if before.meta["scaler"]:
            self.step.scaler.load_state_dict(before.meta["scaler"])

    def _save(self, step: int, val_loss: float | None, log: Log | None) -> None:
        weights, state = (gather(tensors, kept=log is not None) for tensors in (self.weights, self.state))
        if self.world.first(lambda: not all(bool(value.isfinite().all()) for value in weights.values())):
            raise self._diverged(f"weights are no numbers after step {step}")
        if log is None:
            return
        log.sync()
        meta = {
            "model": dataclasses.asdict(self.shape),
            "train": dataclasses.asdict(self.config),
            "val_loss": val_loss,
            "best": self.best,
            "newest": self.newest,
            "seconds": self.seconds,
            "scaler": self.step.scaler.state_dict(),
            "digests": self.digests,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        checkpoint.save(self.config.run, step, weights, state, meta, self.tokenizer, keep=self.config.keep)

    # --- its steps ---------------------------------------------------------------------------------------------------

    def go(self) -> Result:
        config, world = self.config, self.world
        started_at, seconds_before = self.done, self.seconds
        row: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(closing(Log(config.run / "log.csv", self.done))) if world.main else None
            bar = stack.enter_context(Bar(config.run, config.steps, self.done, shown=world.main))
            rows = batches(
                self.sampler,
                range(self.done, config.steps),
                batch=config.batch,
                first=world.rank * self.per_rank,
                count=self.per_rank,
                pin=world.device.type == "cuda",
            )
            stack.enter_context(closing(rows))
            started = time.perf_counter()
            for index, batch in zip(range(self.done, config.steps), rows, strict=True):
                step = index + 1
                self._make(index, batch)
                evaluates = step == config.steps or _due(step, config.eval_every)
                saves = step == config.steps or _due(step, config.save_every or config.eval_every)
                if not (evaluates or saves or _due(step, config.log_every)):
                    continue
                row = self._row(step, started)
                if evaluates:
                    saves |= self._validate(row)
                if log is not None:
                    log.write(row)
                bar.show(row, self.newest.get("val_loss"))
                if saves:
                    self._save(step, row.get("val_loss"), log)
                started = time.perf_counter()
        made, seconds = config.steps - started_at, self.seconds - seconds_before
        return Result(
            run=config.run,
            steps=config.steps,
            train_loss=row.get("train_loss"),
            val_loss=self.newest.get("val_loss"),
            bits_per_byte=self.newest.get("bits_per_byte"),
            best_val_loss=self.best.get("val_loss"),
            best_step=self.best.get("step"),
            seconds=self.seconds,
            tokens_per_s=made * config.batch * config.context / seconds if made else None,
            mfu=made * self.flops / seconds / self.peak / world.size if made else None,
            compile_seconds=self.compile_seconds,
            peak_flops=self.peak,
            peak_source=self.peak_source,
            parameters=self.parameter_count,
        )

    def _make(self, index: int, batch: Tensor) -> None:
        """Step `index`, counted from 0; returns before the device has made it."""
        config = self.config
        set_lr(self.optimizer, config.lr_share(index))
        if self.shape.dropout:
            torch.manual_seed(_mixed(config.seed, index, self.world.rank))
        self._guarded(lambda: self.step(batch), index + 1)

    def _row(self, step: int, started: float) -> dict[str, Any]:
        """The log's row of the steps since the last; waits for the device."""
        config = self.config
        losses, norms = (values.tolist() for values in self._read())
        took = time.perf_counter() - started
        first = step - len(losses) + 1
        if bad := not_finite(first, losses, norms, scaled=self.step.scaler.is_enabled()):
            raise self._diverged(bad)
        self.seconds += took
        return {
            "step": step,
            "tokens": step * config.batch * config.context,
            "seconds": self.seconds,
            "lr": config.lr * config.lr_share(step - 1),
            "train_loss": sum(losses) / len(losses),
            "grad_norm": norms[-1],
            "tokens_per_s": len(losses) * config.batch * config.context / took,
            "mfu": len(losses) * self.flops / took / self.peak / self.world.size,
        }

    def _read(self) -> tuple[Tensor, Tensor]:
        losses, norms = self.step.read()
        return self.world.mean(losses), norms

    def _validate(self, row: dict[str, Any]) -> bool:
        """Adds the validation to a row; whether it is the best so far."""
        config = self.config
        self.model.eval()
        # On every rank all of it: they then agree to the bit, and fsdp's ranks make the same calls.
        loss, bits_per_byte = evaluate(
            self.step.score,
            self.validation,
            self.token_bytes,
            context=config.context,
            batch=self.micro,
            limit=config.eval_tokens,
            device=self.world.device,
        )
        self.model.train()
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss} after step {row['step']}")
        self.newest = {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_byte}
        row.update(self.newest)
        improves = loss < self.best.get("val_loss", math.inf)
        if improves:
            self.best = {"step": row["step"], "val_loss": loss}
        return improves

    # --- what can go wrong -------------------------------------------------------------------------------------------

    def _guarded(self, make: Callable[[], object], step: int) -> None:
        with_room(make, lambda: f"step {step}: {too_large(self.step)}; {checkpoint.left(self.config.run)}")

    def _diverged(self, what: str) -> Diverged:
        return Diverged(f"{what}; {checkpoint.left(self.config.run)}: start another run with a lower --lr")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _mixed(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
