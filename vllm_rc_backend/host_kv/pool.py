"""Where vLLM's KV pool is placed: CUDA tensors whose memory is the host's, pinned and mapped."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vllm_rc_backend.host_kv import memory

logger = logging.getLogger("vllm.rc_topk")

SOURCE = Path(__file__).parent.parent / "kernels" / "csrc" / "host_pool.c"
"""In C, for it runs inside torch's allocator; built when first needed, as Triton builds its launchers."""

SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""torch's settings of its own allocator, by environment variable."""


class HostPoolError(RuntimeError):
    """The pool could not be built or pinned."""


def build(folder: Path) -> Path:
    """Compile the allocator into ``folder``; a second's work, once a process.

    Raises:
        HostPoolError: there is no C compiler, or it failed; the message has what it said.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise HostPoolError(
            "rc_topk: kv_residency=host needs a C compiler (Triton does, too) and found none: install gcc, or name "
            "one in the environment variable CC."
        )
    library = folder / "host_pool.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(library), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HostPoolError(f"rc_topk: {' '.join(command)} failed:\n{done.stderr}")
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The allocator's own figures and errors."""
    return _library_and_pool()[0]


@functools.cache
def _library_and_pool() -> tuple[ctypes.CDLL, torch.cuda.MemPool]:
    if "expandable_segments:true" in "".join(os.environ.get(name, "") for name in SETTINGS).lower():
        raise HostPoolError(
            f"rc_topk: kv_residency=host needs {' and '.join(SETTINGS)} without expandable_segments:True, which does "
            "not go with an allocator of one's own."
        )
    with tempfile.TemporaryDirectory(prefix="rc-topk-build-") as folder:
        path = str(build(Path(folder)))
        loaded = ctypes.CDLL(path)
        allocator = torch.cuda.memory.CUDAPluggableAllocator(
            path, "rc_topk_host_pool_alloc", "rc_topk_host_pool_free"
        )
    loaded.rc_topk_host_pool_bytes.restype = ctypes.c_size_t
    loaded.rc_topk_host_pool_error.restype = ctypes.c_char_p
    loaded.rc_topk_host_pool_limit.argtypes = [ctypes.c_size_t]
    pool = torch.cuda.MemPool(allocator.allocator())
    # Neither may ever be destroyed: torch frees a tensor that outlives its pool in the wrong way (pytorch#146431), and
    # calls an allocator that the interpreter's end has taken first (pytorch#145168). The system takes all back.
    for kept in (allocator, pool):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    return loaded, pool


def held_bytes() -> int:
    """Bytes of host memory that this process has pinned."""
    return int(library().rc_topk_host_pool_bytes())


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """CUDA tensors that are allocated inside lie in pinned host memory.

    It is pinned until the process ends; what tensors no longer need serves the next ones in here. No more is taken than
    the host can spare at entry: the system would hand out more, and end some process when it is used.

    Raises:
        HostPoolError: the memory could not be had; the message says why.
    """
    loaded, pool = _library_and_pool()
    before, begun = held_bytes(), time.monotonic()
    loaded.rc_topk_host_pool_limit(before + memory.spare_bytes())
    logger.info("rc_topk: pinning host memory for the KV pool ...")
    try:
        with torch.cuda.use_mem_pool(pool):
            yield
    except torch.OutOfMemoryError as error:
        reason = loaded.rc_topk_host_pool_error().decode()
        raise HostPoolError(
            f"rc_topk: no host memory for the KV pool: {reason}. Lower host_kv_gib."
        ) from error
    gib, seconds = (held_bytes() - before) / 2**30, time.monotonic() - begun
    logger.info("rc_topk: the KV pool is in host memory: %.2f GiB pinned in %.1f s.", gib, seconds)
