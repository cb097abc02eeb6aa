"""Attention for Flax: an `attention_fn` for Flax's own layers, and a decoder's attention layer with its KV cache."""

try:
    import flax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ImportError("jax_sdpa.nn needs flax, which is not installed: pip install 'jax-sdpa[flax]'") from error

from jax_sdpa.nn.adapters import AttentionFn, attention_fn
from jax_sdpa.nn.cache import KVCache
from jax_sdpa.nn.layer import Attention, MeshAxes
from jax_sdpa.nn.rope import Rope, positions_in_segments

__all__ = ["Attention", "AttentionFn", "KVCache", "MeshAxes", "Rope", "attention_fn", "positions_in_segments"]
