"""Pallas flash-attention kernels for NVIDIA GPUs. Never imports `jax_sdpa`: what a kernel needs comes with the call."""
