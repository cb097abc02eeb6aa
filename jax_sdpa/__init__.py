"""PyTorch's `scaled_dot_product_attention` for JAX: the same function, the same backends, and Pallas kernels of its own."""

from jax_sdpa.errors import NoViableBackendError
from jax_sdpa.functional import dot_product_attention, explain, scaled_dot_product_attention

__all__ = ["NoViableBackendError", "dot_product_attention", "explain", "scaled_dot_product_attention"]
