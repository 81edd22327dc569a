"""One optimizer step: passes forward and backward, clipping, update; as it is, compiled, or as one CUDA graph.

Shapes: R a rank's rows of the batch, T context. Nothing here waits for the device: each step's loss and
gradient norm are left in a record there, which `read` fetches when the log wants them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylm.optim import Optimizer, clip, guard
from tinylm.parallel import Wrapped
from tinylm.train.failures import is_out_of_memory


class Step:
    """Changes the weights by one step for each call.

    micro: rows of one pass, which divides R. room: how many steps may be made between two reads.
    autocast: dtype of the matrix products; fp16 scales the loss. clip_norm: most that the gradient's norm may be.
    graph: capture at `warm_up`, and replay from then on; the optimizer must be capturable.
    """

    def __init__(
        self,
        wrapped: Wrapped,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rows: tuple[int, int],
        micro: int,
        room: int,
        autocast: torch.dtype,
        clip_norm: float | None,
        graph: bool = False,
    ) -> None:
        self.wrapped, self.optimizer = wrapped, optimizer
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.micro, self.autocast, self.clip_norm = micro, autocast, clip_norm
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.rows = torch.zeros(rows, dtype=torch.int64, device=self.device)  # a graph reads its input here
        self.record = torch.zeros(2, room, device=self.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=self.device)  # of the next step in the record
        self.made = 0
        self.captures = graph
        self.graph: torch.cuda.CUDAGraph | None = None  # of one update, once it is captured

    def __call__(self, rows: Tensor) -> None:
        """rows (R, T + 1) int64, on the host or the device: each token's target is the one after it."""
        self.rows.copy_(rows, non_blocking=True)
        if self.graph is None:
            self.update()
        else:
            self.graph.replay()
        self.made += 1

    def loss(self, rows: Tensor) -> Tensor:
        """Mean loss of rows (N, T + 1), to be differentiated."""
        with self._cast():
            return self.wrapped.module(rows[:, :-1], targets=rows[:, 1:])

    @torch.no_grad()
    def score(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of tokens (N, T) whose target is not -100, to be looked at alone."""
        with self._cast():
            return self.wrapped.plain(tokens, targets=targets)

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast != torch.float32)

    def update(self) -> None:
        """One step on `self.rows`."""
        passes = self.rows.split(self.micro)
        total = torch.zeros((), device=self.device)
        for index, rows in enumerate(passes):
            with self.wrapped.reducing(index == len(passes) - 1):
                loss = self.loss(rows) / len(passes)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip(self.parameters, self.clip_norm)
        if not self.scaler.is_enabled():  # which skips by itself
            guard(self.optimizer, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not self.captures:
            self.optimizer.zero_grad()  # a graph's first pass writes its gradients anew
        self.record.index_copy_(1, self.place, torch.stack((total, norm))[:, None])
        self.place += 1

    def read(self) -> tuple[Tensor, Tensor]:
        """(losses, gradient norms) of the steps since the last read, fp32 on this rank's device; (n,) each."""
        losses, norms = self.record[:, : self.made].clone()
        self.place.zero_()
        self.made = 0
        return losses, norms

    def warm_up(self, rows: Tensor) -> None:
        """Compiles, captures, and makes kernels ready, by steps that spoil the state; waits for the device."""
        self.rows.copy_(rows)
        # What a model keeps from its first use, such as RoPE's tables, is made here, not by compiled code.
        self.score(self.rows[:1, :-1], self.rows[:1, 1:])
        if self.captures:
            self._capture()
        else:
            for _ in range(2):
                self.update()
                self.place.zero_()
        self.read()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(3):  # torch's advice before a capture: autotuning and lazy set-up are over then
                self.update()
                self.place.zero_()
                self.optimizer.zero_grad()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        with torch.cuda.graph(graph):
            self.update()
        self.graph = graph

    def fits(self, micro: int) -> bool:
        """Whether this rank alone has the memory for one pass over that many rows, beside the optimizer's state."""
        assert self.wrapped.alone is not None
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        rows = self.rows[:micro]
        try:
            with self._cast():
                loss = self.wrapped.alone(rows[:, :-1], targets=rows[:, 1:])
            torch.autograd.grad(loss, self.parameters)  # not backward, which the other ranks would have to join
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
