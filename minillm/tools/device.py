"""What a process computes with: its rank under torchrun, the device asked for, its precision."""

import gc
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from minillm.errors import InputError
from minillm.model import ModelConfig

if TYPE_CHECKING:
    from minillm.run import Runtime


@contextmanager
def start_runtime(
    device: str, precision: str = "auto", shard: bool = False, recompute: bool = False
) -> Iterator["Runtime"]:
    """Joins the other processes, if any; leaves them at the end, also after an error. A single process has
    nothing to shard."""
    from minillm.run import Runtime

    rank, world_size, local_rank = processes()
    chosen = choose_device(device, local_rank)
    if shard and chosen.type == "mps":
        raise InputError("--shard: torch shards on cpu and cuda only; leave it out")
    if world_size > 1:
        # One process may prepare data for hours while the others wait.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    try:
        dtype = choose_dtype(chosen) if precision == "auto" else getattr(torch, precision)
        with ExitStack() as closing:
            if rank:  # the first process alone speaks, but for errors
                closing.enter_context(redirect_stdout(closing.enter_context(open(os.devnull, "w"))))
            kind: type[Runtime] = Runtime
            if shard and world_size > 1:
                from minillm.fast.sharding import ShardedRuntime

                kind = ShardedRuntime
            yield kind(chosen, dtype, rank, world_size, recompute, closing)
        if world_size > 1:
            dist.barrier()  # the main process has more to do at the end: the others wait for it
    finally:
        if world_size > 1:
            # DistributedDataParallel holds the group too. If it outlived this, the group would end with it,
            # while its threads wait for Python: now and then the process hangs or aborts.
            traceback.clear_frames(sys.exc_info()[2])  # those of an error hold the model
            gc.collect()
            dist.destroy_process_group()


def processes() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun says in the environment."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, int(os.environ.get("LOCAL_RANK", "0"))
    try:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        rank, world_size, local_rank, _ = (int(os.environ[name]) for name in names)
        os.environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"WORLD_SIZE is set in the environment as torchrun does, but not the rest ({error}); start with "
            "torchrun, or unset WORLD_SIZE"
        ) from None
    return rank, world_size, local_rank


def parameter_count(config: ModelConfig) -> int:
    """How many weights a model of this shape has."""
    width, head = config.hidden_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    norms = 2 * width + (2 * head if config.qk_norm else 0)
    biases = (heads - config.num_attention_heads) * head if config.qkv_bias else 0
    block = heads * head * width + 3 * width * config.intermediate_size + norms + biases
    ends = 1 if config.tie_word_embeddings else 2
    return ends * config.vocab_size * width + config.num_hidden_layers * block + width


def check_memory(config: ModelConfig) -> None:
    """InputError for a model whose weights alone this machine cannot hold, before any is made."""
    weights = parameter_count(config)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if 4 * weights > there:
        raise InputError(
            f"a model of {weights:,} weights needs {4 * weights / 1e9:,.0f} GB of memory for them alone; "
            "give a smaller --depth or --width"
        )


def choose_device(name: str, local_rank: int) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; several processes take one GPU each."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; give auto, cpu, cuda or mps") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    there = {"cpu": True, "cuda": (device.index or 0) < count, "mps": torch.backends.mps.is_available()}
    if not there.get(device.type):
        raise InputError(f"--device {device}: not available here ({count} CUDA devices); give auto or cpu")
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32; never float16."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        if features.get("avx512_bf16") or features.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32
