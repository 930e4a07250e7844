"""RCTopKBackend: the class that vLLM loads. Each platform has its own; what they share is in layer.py."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from vllm_rc_backend.compat import UnsupportedError, check_version

check_version()

RCTopKBackend: Any
if current_platform.is_cpu():
    from vllm_rc_backend.backend_cpu import RCTopKCPUBackend as RCTopKBackend
elif current_platform.is_cuda():
    from vllm_rc_backend.backend_cuda import RCTopKCUDABackend as RCTopKBackend
else:
    raise UnsupportedError(
        f"rc_topk runs on NVIDIA GPUs and on CPUs, not on {current_platform.device_name!r}. Start without "
        "--attention-backend rc_topk."
    )
