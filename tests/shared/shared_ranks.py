"""
Processes that train together, as transformers' shared tests start them: what `tests/distributed_testing_utils.py`
gives there, which is not in the source distribution. On CPUs, with gloo.
"""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


# What takes seconds to import is imported by the process that all others are forked from.
PRELOADED = ["torch.distributed.fsdp", "transformers.testing_utils", "transformers.models.auto", "blockgen_hf"]


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """All ranks share the CPUs."""


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """Runs `function(rank, *args)` in each of `nprocs` processes, and raises what one of them raises."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOADED)
    # The tests' modules are not importable there yet, so the function travels as bytes.
    pickled = pickle.dumps((function, args))
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        mp.start_processes(_run_rank, args=(pickled,), nprocs=nprocs, start_method=method)


def _run_rank(rank: int, pickled: bytes) -> None:
    import transformers_tests

    torch.set_num_threads(1)
    transformers_tests.open_package()
    with transformers_tests.import_settings():
        function, args = pickle.loads(pickled)
    function(rank, *args)


def run_distributed(world_size: int) -> Callable[[Callable], Callable[..., None]]:
    """`run_distributed(n)(function)(*args)` runs `function(rank, *args)` in n processes that form a group."""

    def launcher(function: Callable) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            _start_rank_processes(_run_in_group, (function, args, world_size, port), world_size)

        return launch

    return launcher


def _run_in_group(rank: int, function: Callable, args: tuple, world_size: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
