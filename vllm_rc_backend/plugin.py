"""vLLM's entry point: makes RC_TOPK a name that ``--attention-backend`` accepts, and our models known."""

from __future__ import annotations

from typing import Any

NAME = "RC_TOPK"
CLASS_PATH = "vllm_rc_backend.backend.RCTopKBackend"


def register() -> Any:
    """Register the backend and the models; the ``vllm.general_plugins`` entry point.

    Idempotent, quick, never touches a device.

    Returns:
        The member of vLLM's ``AttentionBackendEnum``.
    """
    from vllm_rc_backend import compat
    from vllm_rc_backend.models import MODELS
    from vllm_rc_backend.observability import metrics

    member = backend_member()
    compat.register_models(MODELS)
    metrics.offer()
    return member


def backend_member() -> Any:
    """The member of vLLM's ``AttentionBackendEnum``, made when first asked for."""
    from vllm_rc_backend import compat

    member = compat.register_member(NAME, CLASS_PATH)
    # vLLM unpickles its configuration before it loads plugins (spawned processes, Ray actors). A member that was added
    # at run time would be looked up by value there and not be found; this way unpickling registers it first. It must
    # not offer metrics: a Ray actor learns only later which folder its server reads.
    member.__reduce_ex__ = _reduce
    compat.let_cpu_platform_choose(member)
    return member


def _reduce(protocol: object) -> tuple[Any, tuple[()]]:
    return backend_member, ()
