"""The two faces that a case's line is written against: the same names over torch and over jax_sdpa.

What both frameworks have under one name (`scaled_dot_product_attention`, `sdpa_kernel`, `SDPBackend`, `causal_lower_right`) is
passed through untouched. The rest is each framework's own way to say the same thing: where jax_sdpa has a structured mask,
torch has a dense bool one; where jax_sdpa has `softcap`, torch has a few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_sdpa
from jax_sdpa import attention
from jax_sdpa.attention import bias
from jax_sdpa.compare.devices import Device
from jax_sdpa.compare.extras import need


class Jax:
    """jax_sdpa on a device."""

    name = "jax_sdpa"
    SDPBackend = attention.SDPBackend
    sdpa_kernel = staticmethod(attention.sdpa_kernel)
    causal_lower_right = staticmethod(bias.causal_lower_right)

    def scaled_dot_product_attention(self, *args: Any, **kwargs: Any) -> Any:
        return jax_sdpa.scaled_dot_product_attention(*args, **kwargs)

    def dot_product_attention(self, *args: Any, **kwargs: Any) -> Any:
        return jax_sdpa.dot_product_attention(*args, **kwargs)

    def sliding_window(self, L: int, S: int, window: int) -> Any:
        """Each query sees the last `window` keys, its own included."""
        return bias.sliding_window(window - 1, 0)

    def key_lengths(self, lengths: Any, S: int) -> Any:
        """(B,) lengths: the keys that a cache of S slots holds so far."""
        return bias.KeyLengths(lengths)

    def packed(self, segment_ids: Any) -> Any:
        """(B, L) ids: causal within each of the sequences that share a row."""
        return bias.causal() & bias.SegmentIds(segment_ids)

    def softcapped(self, query: Any, key: Any, value: Any, *, scale: float, softcap: float) -> Any:
        """Causal attention, grouped heads, softcap * tanh(scores / softcap); in and out (B, H, L, E)."""
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # JAX's own layout, (B, L, H, E)
        return self.heads_first(self.dot_product_attention(query, key, value, scale=scale, softcap=softcap, is_causal=True))

    def heads_first(self, out: Any) -> Any:
        """(B, L, H, E) -> (B, H, L, E)."""
        return jnp.swapaxes(out, 1, 2)


class Explain(Jax):
    """jax_sdpa asked, not run: a line gives the `Choice` of the backend that it would run on."""

    def __init__(self, grad: bool) -> None:
        self.grad = grad

    def scaled_dot_product_attention(self, *args: Any, **kwargs: Any) -> Any:
        return jax_sdpa.explain(*args, call=jax_sdpa.scaled_dot_product_attention, grad=self.grad, **kwargs)

    def dot_product_attention(self, *args: Any, **kwargs: Any) -> Any:
        return jax_sdpa.explain(*args, call=jax_sdpa.dot_product_attention, grad=self.grad, **kwargs)

    def heads_first(self, out: Any) -> Any:
        return out  # a Choice


class Torch:
    """torch on a device."""

    name = "torch"

    def __init__(self, device: Device) -> None:
        self.device = device
        self.torch = need("torch")
        self._attention = need("torch.nn.attention")
        self.SDPBackend = self._attention.SDPBackend
        self.causal_lower_right = need("torch.nn.attention.bias").causal_lower_right
        self.scaled_dot_product_attention = self.torch.nn.functional.scaled_dot_product_attention

    def sdpa_kernel(self, backends: Any) -> Any:
        return self._attention.sdpa_kernel(backends)

    def sliding_window(self, L: int, S: int, window: int) -> Any:
        distance = self._arange(L)[:, None] - self._arange(S)[None, :]
        return (distance >= 0) & (distance < window)

    def key_lengths(self, lengths: Any, S: int) -> Any:
        return (self._arange(S) < lengths[:, None])[:, None, None, :]

    def packed(self, segment_ids: Any) -> Any:
        L = segment_ids.shape[-1]
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return same & (self._arange(L)[:, None] >= self._arange(L)[None, :])

    def softcapped(self, query: Any, key: Any, value: Any, *, scale: float, softcap: float) -> Any:
        """Written out, as torch's SDPA has no softcap; half inputs in float32, rounded once, as its MATH backend does.

        Source: `eager_attention_forward` of transformers' modeling_gemma2.py (scale, softcap, mask, softmax in float32).
        """
        torch, dtype = self.torch, query.dtype
        groups, wide = query.shape[1] // key.shape[1], torch.promote_types(dtype, torch.float32)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = softcap * torch.tanh(scale * (query @ key.mT) / softcap)
        causal = self._arange(query.shape[-2])[:, None] >= self._arange(key.shape[-2])[None, :]
        scores = scores.masked_fill(~causal, -torch.inf)
        return (torch.softmax(scores, -1) @ value).to(dtype)

    def _arange(self, n: int) -> Any:
        return self.torch.arange(n, device=self.device.torch)

    def tensors(self, arrays: dict[str, np.ndarray], *, differentiable: Sequence[str] = (), exact: bool = False) -> dict[str, Any]:
        """The same numbers as torch tensors; `exact`: floats as float64."""
        made = {}
        for name, array in arrays.items():
            if not jnp.issubdtype(array.dtype, jnp.floating):
                tensor = self.torch.from_numpy(array)
            elif exact:
                tensor = self.torch.from_numpy(array.astype(np.float64))
            else:
                wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32)  # NumPy's bfloat16 is unknown to torch
                tensor = self.torch.from_numpy(wide).to(getattr(self.torch, array.dtype.name))
            made[name] = tensor.to(self.device.torch).requires_grad_(name in differentiable)
        return made


class Oracle(Torch):
    """torch whose every call runs MATH, also where a line asks for something else: with float64 tensors the definition."""

    def sdpa_kernel(self, backends: Any = None) -> Any:
        return self._attention.sdpa_kernel([self.SDPBackend.MATH])


def torch_to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as float64."""
    return tensor.detach().to("cpu").double().numpy()


def jax_to_numpy(array: jax.Array) -> np.ndarray:
    """A JAX array as float64."""
    return np.asarray(array).astype(np.float64)
