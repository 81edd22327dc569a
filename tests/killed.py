"""Trains, is killed at random points, goes on, and says in JSON what came out: `killed.py DATA FOLDER SEED`.

A script of its own, because a fork wants a process without threads: each run is a child of this one, which has
torch imported and no more. Most children count what they do with files (by an audit hook) and their steps, and
kill themselves at the n-th; some are killed from here after a random time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import filelock  # noqa: F401  # ahead of the forks, as is what the first optimizer imports
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo

from tinylm.train import TrainConfig, train
from tinylm.train.step import Step

FILE_EVENTS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.listdir", "os.scandir"}
COUNTED, TIMED = 16, 4


def child(work: Callable[[], None]) -> int:
    """The pid of a child that does `work` and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def count(at: Callable[[int], None]) -> None:
    """Calls `at` with the number of each event in this process from now on."""
    counted = 0

    def event(name: str, _: object = None) -> None:
        nonlocal counted
        if name in FILE_EVENTS:
            counted += 1
            at(counted)

    made = Step.__call__

    def step(self: Step, rows: torch.Tensor) -> None:
        made(self, rows)
        event("open")

    Step.__call__ = step  # type: ignore[method-assign]
    sys.addaudithook(event)


def kill_at(point: int) -> Callable[[int], None]:
    return lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == point else None


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(data: str, folder: Path, seed: int) -> dict[str, object]:
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # type: ignore[assignment]  # a kill loses nothing that was written, synced or not
    config = TrainConfig(
        data=data, model="layers=1,dim=16,heads=2,kv_heads=2,head_dim=8,d_ff=16", context=16, batch=4, steps=10,
        micro_batch=2, dropout=0.1, log_every=1, eval_every=4, save_every=3, keep=1, eval_tokens=64, peak_flops=1e9,
        device="cpu",
    )  # fmt: skip

    def run(name: str, resume: bool) -> None:
        train(dataclasses.replace(config, out=str(folder / name), resume=resume))

    def counting() -> None:
        total = folder / "total"
        descriptor = os.open(total, os.O_CREAT | os.O_WRONLY)
        count(lambda n: os.ftruncate(descriptor, n))  # a file's length, since this must not be an event itself
        run("whole", False)

    started = time.perf_counter()
    assert status(child(counting)) == 0
    took = time.perf_counter() - started
    events = (folder / "total").stat().st_size

    draw = random.Random(seed)
    points: list[int | float] = [draw.randint(1, events) for _ in range(COUNTED)]
    points += [draw.uniform(0, took) for _ in range(TIMED)]
    statuses, resumed = [], []
    for number, point in enumerate(points):
        name = f"killed-{number}"

        def victim(name: str = name, point: float = point) -> None:
            if isinstance(point, int):
                count(kill_at(point))
            run(name, False)

        pid = child(victim)
        if isinstance(point, float):
            time.sleep(point)
            os.kill(pid, signal.SIGKILL)
        statuses.append(status(pid))
        resumed.append(status(child(lambda name=name: run(name, True))))  # type: ignore[misc]
    return {"events": events, "points": points, "statuses": statuses, "resumed": resumed}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
