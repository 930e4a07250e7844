"""Kernels can be compiled while vLLM's monitor of compilations watches."""

from __future__ import annotations

import inspect

import pytest

from vllm_rc_backend import compat
from vllm_rc_backend.evaluation.kernel_check import Case

jit = pytest.importorskip("triton.runtime.jit")


def test_structured_constants_do_not_stop_a_compile_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    original = jit.serialize_specialization_data
    monkeypatch.setattr(jit, "serialize_specialization_data", original)  # put back afterwards

    class Plain:
        """Stands for the compile options, and for the target that newer versions of Triton want as well."""

    def describe(constant: object) -> str | None:
        names = list(inspect.signature(original).parameters)
        given: dict[str, object] = {name: Plain() for name in names}
        given |= {"name": "kernel", "signature": {}, "constants": {(0,): constant}, "attrs": {}, "key": "key"}
        found: str | None = jit.serialize_specialization_data(**given)
        return found

    plain = describe(3)
    with pytest.raises(TypeError, match="Geometry"):
        describe(Case().geometry)
    compat.let_compile_hooks_pass()
    compat.let_compile_hooks_pass()
    assert describe(Case().geometry) is None
    assert describe(3) == plain
