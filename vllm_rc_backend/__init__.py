"""Query-aware sparse decoding for vLLM that estimates the attention mass it does not read."""

__version__ = "0.1.0"
