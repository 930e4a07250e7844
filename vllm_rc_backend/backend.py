"""RCTopKBackend: the class that vLLM loads. Each platform has its own; what they share is in layer.py."""

from __future__ import annotations

from vllm.platforms import current_platform

from vllm_rc_backend.compat import UnsupportedError, check_version


def backend_class() -> type:
    """The backend of this platform.

    Raises:
        UnsupportedError: neither a CUDA nor a CPU platform, or an unsupported vLLM.
    """
    check_version()
    if current_platform.is_cpu():
        from vllm_rc_backend.backend_cpu import RCTopKCPUBackend

        return RCTopKCPUBackend
    if current_platform.is_cuda():
        from vllm_rc_backend.backend_cuda import RCTopKCUDABackend

        return RCTopKCUDABackend
    raise UnsupportedError(
        f"rc_topk runs on NVIDIA GPUs and on CPUs, not on {current_platform.device_name!r}. Start without "
        "--attention-backend rc_topk."
    )


RCTopKBackend = backend_class()
