"""Model classes for vLLM. The plugin registers their names; vLLM imports a class when it serves such a model."""

from __future__ import annotations

MODELS = {"RATPlusForCausalLM": "vllm_rc_backend.models.rat_plus:RATPlusForCausalLM"}
"""``architectures`` of config.json, and the class that vLLM loads for it."""
