"""Many ranks as an ordinary unit test: `run(world, fn, *args)` on gloo, over one pool of processes for the whole test run.

A pool rank keeps its process group and its grids for the next test. `fn` must be importable, takes what `args` pickle to, and
returns something picklable; `run` gives the list of what each rank returned, or raises the first rank's error with its
traceback.
"""

import atexit
import gc
import os
import queue
import socket
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 8  # the largest world a test may ask for
TIMEOUT = 300  # seconds that a task may take


class RankError(Exception):
    """A rank raised: its number, error and traceback."""


_pools: dict[int, "_Pool"] = {}


def run(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`[fn(*args) on rank 0, …, on rank world-1]`."""
    if world not in _pools:
        _pools[world] = _Pool(world)
    return _pools[world].run(fn, args)


class _Pool:
    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.tasks = [context.Queue() for _ in range(world)]
        self.results = context.Queue()
        self.ranks = [
            context.Process(target=_serve, args=(rank, world, port, self.tasks[rank], self.results), daemon=True) for rank in range(world)
        ]
        for process in self.ranks:
            process.start()
        atexit.register(self.close)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for task in self.tasks:
            task.put((fn, args))
        answers: dict[int, Any] = {}
        while len(answers) < len(self.ranks):
            try:
                rank, ok, value = self.results.get(timeout=TIMEOUT)
            except queue.Empty:
                self.close()
                raise RankError(f"no answer within {TIMEOUT} s from ranks {sorted(set(range(len(self.ranks))) - set(answers))}") from None
            if not ok:  # the others may hang in a collective: this pool is lost
                self.close()
                raise RankError(f"rank {rank}: {value}")
            answers[rank] = value
        return [answers[rank] for rank in range(len(self.ranks))]

    def close(self) -> None:
        _pools.pop(len(self.ranks), None)
        for process in self.ranks:
            process.kill()


def _end_with_the_parent() -> None:
    """A test run that is killed leaves nothing behind: its queues alone would be waited for for ever."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(rank: int, world: int, port: int, tasks: Any, results: Any) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0, timeout=timedelta(seconds=TIMEOUT))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
    while True:
        fn, args = tasks.get()
        try:
            results.put((rank, True, fn(*args)))
        except BaseException as error:  # pytest.raises fails with one; a rank that dies silently would be waited for
            results.put((rank, False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        # Modules refer to themselves and to their groups, and each group keeps a thread that polls: without this a pool rank has
        # a thousand of them after a few grids, and the machine does nothing else.
        gc.collect()
        gc.freeze()  # what is left, mostly modules, stays: no later collection need look at it, which would take a third of a second
