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
static int pieces;
int cuMemHostRegister_v2(void *p, size_t size, unsigned flags) {
  if (flags != 3 || pieces == atoi(getenv("MOST_PIECES"))) return 2;
  printf("register %zu\\n", size); fflush(stdout); pieces++; return 0;
}
int cuMemHostUnregister(void *p) { printf("unregister\\n"); fflush(stdout); pieces--; return 0; }
"""

PROGRAM = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.rc_topk_host_pool_alloc.restype = ctypes.c_void_p
lib.rc_topk_host_pool_alloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
lib.rc_topk_host_pool_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
lib.rc_topk_host_pool_bytes.restype = ctypes.c_size_t
lib.rc_topk_host_pool_error.restype = ctypes.c_char_p
size = 5 << 29
p = lib.rc_topk_host_pool_alloc(size, 0, None)
print("held", lib.rc_topk_host_pool_bytes(), lib.rc_topk_host_pool_error().decode(), flush=True)
if p:
    ctypes.memset(p + size - 1, 7, 1)
    lib.rc_topk_host_pool_free(p, size, 0, None)
    print("held", lib.rc_topk_host_pool_bytes(), flush=True)
"""


def run(folder: Path, most_pieces: int) -> list[str]:
    """What the allocator asks the driver for, and what it says, for 2.5 GiB that no page of is touched."""
    (folder / "driver.c").write_text(DRIVER)
    driver = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", str(folder / "driver.c"), "-o", str(driver)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pool.build(folder))],
        env={"LD_LIBRARY_PATH": str(folder), "MOST_PIECES": str(most_pieces)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_all_is_registered_in_pieces_and_given_back(tmp_path: Path) -> None:
    register = [f"register {1 << 30}", f"register {1 << 30}", f"register {1 << 29}"]
    assert run(tmp_path, 3) == [*register, f"held {5 << 29} ", *["unregister"] * 3, "held 0"]


def test_a_driver_that_refuses_gets_back_what_it_gave(tmp_path: Path) -> None:
    *asked, said = run(tmp_path, 1)
    assert asked == [f"register {1 << 30}", "unregister"]
    assert said.startswith("held 0 the driver could not pin bytes 1073741824 to 2147483648 of 2684354560")


def test_no_driver(tmp_path: Path) -> None:
    path = pool.build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True
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
