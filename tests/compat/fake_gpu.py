"""A vLLM platform plugin that stands for an H200, so that configuration and planning run without one.

vLLM's CUDA platform is Python but for what it asks the driver, which is answered here, and for compiled modules that it
imports on the way. Those are replaced by empty ones where they are missing: nothing is computed in these tests, and
whatever would call into them fails. What models ask them while they are imported is answered with no.
"""

from __future__ import annotations

import importlib.util
import sys
import types

COMPILED = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C")

QUERIES = (
    "cutlass_group_gemm_supported",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_fp4",
)


MEMORY = 139 * 2**30
"""Bytes of the device, all free."""


class _Empty:
    """Finds the compiled modules that this machine does not have."""

    @staticmethod
    def find_spec(
        name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, _Empty()) if name in COMPILED else None

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        pass


def register() -> str:
    """The ``vllm.platform_plugins`` entry point."""
    import torch

    sys.meta_path.append(_Empty)  # type: ignore[arg-type]
    for query in QUERIES:
        setattr(torch.ops._C, query, lambda capability: False)
    torch.cuda.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    return "fake_gpu.H200"


def __getattr__(name: str) -> type:
    """The platform class, made when vLLM asks for it: its base can be imported only then."""
    if name != "H200":
        raise AttributeError(name)
    from vllm.platforms import cuda, interface

    class H200(cuda.NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> interface.DeviceCapability:
            return interface.DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H200"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return MEMORY

    globals()["H200"] = H200
    return H200
