"""The reference kernels, fast. Each file names its twin; ``vllm_rc_backend.attention_triton`` launches them."""
