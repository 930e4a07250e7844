"""KV pages in host memory: how much there is, where vLLM's pool is placed, and the pages kept on the device."""
