"""Several processes for a test, joined by gloo on this machine."""

import os
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def join(folder, rank, count):
    """Become one of ``count`` processes that meet in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )


def leave():
    """End this process once all have come here, without tearing down the interpreter.

    gloo's threads now and then abort a process that shuts down in the ordinary way ("terminate called without an
    active exception"), after all of its work is done.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _work(rank, work, folder, count):
    join(folder, rank, count)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    leave()


def run_processes(work, folder, count=2):
    """What ``work(rank)`` returns in each of several processes; a function of a module, so that it can be found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        multiprocessing.spawn(_work, (work, str(folder), count), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
