"""The pinned allocator without a GPU: built, and run against a driver that only keeps count."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_rc_backend.host_kv import pool

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

DRIVER = """
#include <stdio.h>
#include <stdlib.h>
int cuMemHostRegister_v2(void *p, size_t size, unsigned flags) {
  if (flags != 3 || getenv("REFUSE")) return 2;
  printf("register %zu\\n", size); fflush(stdout); return 0;
}
int cuMemHostUnregister(void *p) { printf("unregister\\n"); fflush(stdout); return 0; }
"""

SIZE = 5 << 20

PROGRAM = """
import ctypes, sys
lib, size, limit = ctypes.CDLL(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
lib.rc_topk_host_pool_alloc.restype = ctypes.c_void_p
lib.rc_topk_host_pool_alloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
lib.rc_topk_host_pool_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
lib.rc_topk_host_pool_bytes.restype = ctypes.c_size_t
lib.rc_topk_host_pool_error.restype = ctypes.c_char_p
lib.rc_topk_host_pool_limit.argtypes = [ctypes.c_size_t]
lib.rc_topk_host_pool_limit(limit)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
p = lib.rc_topk_host_pool_alloc(size, 0, None)
print("held", lib.rc_topk_host_pool_bytes(), lib.rc_topk_host_pool_error().decode(), flush=True)
if p:
    # What a kernel says may lag by some pages a processor.
    assert resident() - before >= size - (1 << 20), "not all pages were taken"
    ctypes.memset(p + size - 1, 7, 1)
    assert lib.rc_topk_host_pool_alloc(limit, 0, None) is None, "more than the limit in all"
    lib.rc_topk_host_pool_free(p, size, 0, None)
    print("held", lib.rc_topk_host_pool_bytes(), flush=True)
"""


def run(folder: Path, size: int = SIZE, limit: int = SIZE, **env: str) -> list[str]:
    """What the allocator asks the driver for, and what it says."""
    (folder / "driver.c").write_text(DRIVER)
    driver = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", str(folder / "driver.c"), "-o", str(driver)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pool.build(folder)), str(size), str(limit)],
        env={"LD_LIBRARY_PATH": str(folder), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("size", [1, 4097, SIZE])
def test_all_is_taken_registered_and_given_back(size: int, tmp_path: Path) -> None:
    assert run(tmp_path, size) == [f"register {size}", f"held {size} ", "unregister", "held 0"]


def test_a_driver_that_refuses(tmp_path: Path) -> None:
    assert run(tmp_path, REFUSE="1") == [f"held 0 the driver could not pin {SIZE} bytes (CUresult 2)"]


def test_more_than_the_host_can_spare(tmp_path: Path) -> None:
    expected = "held 0 3072.0 GiB are wanted on top of 0.0, and the host can spare 2.5 in all"
    assert run(tmp_path, 3 << 40, 5 << 29) == [expected]


def test_no_driver(tmp_path: Path) -> None:
    path = pool.build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(SIZE), str(SIZE)],
        capture_output=True,
        text=True,
        check=True,
    )
    if "held 0" in done.stdout:  # a machine with a driver has another answer
        assert "libcuda.so.1" in done.stdout


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pool.HostPoolError, match="needs a C compiler"):
        pool.build(tmp_path)


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(pool.HostPoolError, match=r"false .*host_pool\.c .* failed"):
        pool.build(tmp_path)
