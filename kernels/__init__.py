"""Kernels: ``reference`` is plain torch and defines each of them, ``triton`` is the same, fast. No vLLM here."""
