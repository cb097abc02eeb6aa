"""Flax's `attention_fn`: one argument of `nnx.MultiHeadAttention` or `linen.MultiHeadDotProductAttention` to change.

What reaches an `attention_fn` (flax 0.12): arrays (batch..., L, heads, head dim) with zero, one or several batch dims; a mask of
0/1 floats; the layer's settings by keyword. linen drops every keyword that the function's signature does not name, without a
word, and nnx passes `is_causal=False` over whatever a `functools.partial` bound. So every keyword is named here, floats are made
bool, and causal attention is a field of the adapter, not an argument to bind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jax_sdpa import check
from jax_sdpa.attention import SDPBackend
from jax_sdpa.context import allowed_now
from jax_sdpa.dispatch import HEADINGS
from jax_sdpa.errors import NoViableBackendError
from jax_sdpa.functional import dot_product_attention
from jax_sdpa.implementations import math
from jax_sdpa.masks import Mask


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """Flax's attention on jax_sdpa's engine: hand it to a Flax layer as `attention_fn`.

    ::

        scores = einsum("...qhd,...khd->...hqk", query, key) * scale + bias
        weights = dropout(softmax(where(mask != 0 & causal & window, scores, -inf)))
        return einsum("...hqk,...khd->...qhd", weights, value)

    Args:
        is_causal: queries see the keys up to their own position. It is OR-ed with what the layer passes (nnx's `is_causal=`); a
            `functools.partial(attention_fn, is_causal=True)` would be overridden by nnx. Ignored for one query with a mask (a
            decode step, whose mask says which keys exist); for other L != S an error.
        window: (left, right), inclusive distances in keys; -1 = unlimited.
        scale: default 1 / sqrt(head dim).
        softcap: as in Gemma 2.

    A frozen, hashable value: two equal adapters are one and the same to `jit`.

    Its call takes, as Flax's own functions do, `query, key, value`, (batch..., length, heads, head dim), promoted to one dtype
    (`dtype` if it is given), `bias` (float, added) and `mask` (bool, or 0/1 in any other dtype, broadcastable to (batch...,
    heads, L, S); or a structured mask of `jax_sdpa.attention.bias`, which a Flax layer passes on as it is, except in decode), and:

    * fewer key/value heads than query heads (grouped-query attention), and values of another head dim;
    * `dropout_rate` with `dropout_rng`, unless `deterministic`. `broadcast_dropout=True`, Flax's default, draws one (L, S) mask for
      all batch entries and heads, with Flax's own bits: the weights are materialised, and backends other than MATH refuse it.
      With `broadcast_dropout=False` the bits are jax_sdpa's, the same on every backend, and nothing of size L x S is stored;
    * `module`: the weights are sown as Flax does ('intermediates', `attention_weights`), by MATH;
    * `precision` holds for the products; `force_fp32_for_softmax` is always so;
    * `qk_attn_weights_einsum`, `attn_weights_value_einsum`, `einsum_dot_general`: a ValueError: fused products have no such hook.

    Returns:
        (batch..., L, heads, value head dim). A query that may attend to nothing gives 0 (Flax: the mean of the values).

    Raises:
        ValueError, TypeError: as `jax_sdpa.dot_product_attention`, and as said above.
        NoViableBackendError: a surrounding `sdpa_kernel` leaves out MATH where it is needed.

    Source: flax.linen.dot_product_attention, flax.nnx.dot_product_attention (flax 0.12).

    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...     8, 64, num_kv_heads=2, decode=False, attention_fn=AttentionFn(is_causal=True), rngs=nnx.Rngs(0)
    ... )
    >>> layer(jnp.ones((2, 5, 64))).shape
    (2, 5, 64)
    """

    is_causal: bool = False
    window: tuple[int, int] | None = None
    scale: float | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            object.__setattr__(self, "window", tuple(self.window))  # a list would be no part of a hashable value

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Any = None,
    ) -> jax.Array:
        hooks = {
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
        }
        if given := [name for name, hook in hooks.items() if hook is not None]:
            raise ValueError(
                f"{' and '.join(given)} cannot be honoured: a fused kernel makes its products itself and calls no einsum. Use "
                "Flax's own attention function where products are replaced (quantised, say)."
            )
        if input_positions is not None:
            raise ValueError(
                "input_positions belong to rotary embeddings, which this attention_fn does not apply: use jax_sdpa.nn.Attention "
                "with rope=Rope(...), or rotate query and key first (jax_sdpa.nn.Rope)."
            )
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        rate = 0.0 if deterministic else dropout_rate
        options = {
            "bias": _added(bias, query.dtype),
            "mask": _selecting(mask),
            "is_causal": self._causal(is_causal, query.shape[-3], key.shape[-3], mask is not None),
            "local_window_size": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        with _matmul_precision(precision):
            if module is not None or (rate > 0 and broadcast_dropout):
                return _by_weights(query, key, value, options, rate, dropout_rng, broadcast_dropout, module)
            return dot_product_attention(query, key, value, **options, dropout_p=rate, dropout_rng=dropout_rng)

    def _causal(self, asked: bool, L: int, S: int, has_mask: bool) -> bool:
        if not (self.is_causal or asked) or (L == 1 and has_mask):
            return False
        if L != S:
            raise ValueError(
                f"is_causal needs as many queries as keys, got L={L} and S={S}: which key is the first query's own? Say it "
                "by a mask, such as causal_lower_right(L, S) or causal_upper_left(L, S) of jax_sdpa.attention.bias."
            )
        return True


def _added(bias: Any, dtype: Any) -> Any:
    """A bias in a dtype that the engine takes: the query's, or float32."""
    if bias is None:
        return None
    bias = check.as_array(bias, "bias")
    return bias if bias.dtype in (dtype, jnp.float32) or not jnp.issubdtype(bias.dtype, jnp.floating) else bias.astype(jnp.float32)


def _selecting(mask: Any) -> Any:
    """Flax's masks are 0/1 arrays of any dtype (`make_causal_mask`, `combine_masks`): what is not 0 takes part."""
    if mask is None or isinstance(mask, Mask):
        return mask
    return check.as_array(mask != 0, "mask")  # first the comparison: a NumPy mask may be float64


def _matmul_precision(precision: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which products have Flax's `precision`; None leaves what holds around."""
    if precision is None:
        return contextlib.nullcontext()
    of_operands = precision if isinstance(precision, tuple) else (precision,)
    names = {one.name.lower() if isinstance(one, jax.lax.Precision) else getattr(one, "name", one) for one in of_operands}
    if len(names) != 1 or not isinstance(name := names.pop(), str):
        raise ValueError(f"precision must be one jax.lax.Precision, or one name, for both operands, got {precision!r}.")
    return jax.default_matmul_precision(name)


def _by_weights(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    options: dict[str, Any],
    rate: float,
    rng: Any,
    broadcast: bool,
    module: Any,
) -> jax.Array:
    """Attention by MATH's own steps, for whoever wants to see or to change the weights: they are an array (…, heads, L, S)."""
    reasons = ["The weights are asked for (sow_weights=True)."] if module is not None else []
    if rate > 0 and broadcast:
        reasons += ["One dropout mask for all batch entries and heads is asked for: set broadcast_dropout=False."]
    allowed = allowed_now().backends
    if SDPBackend.MATH not in allowed:
        for backend in allowed:
            warnings.warn("\n".join([HEADINGS[backend], *reasons]), UserWarning, stacklevel=3)
        lines = [f"{backend.name}: {' '.join(reasons)}" for backend in allowed]
        raise NoViableBackendError("\n".join(["Only MATH makes the attention weights, and it is not allowed here.", *lines]))
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout_rate must be between 0 and 1, got {rate}.")
    if rate > 0 and rng is None:
        raise ValueError(f"dropout_rate={rate} needs a key: pass dropout_rng, or rngs=nnx.Rngs(dropout=...) to the layer.")
    in_fused_order = {} if broadcast else {"dropout_p": rate, "dropout_rng": rng}
    request, shape = check.jax_request(query, key, value, **options, **in_fused_order)
    scores_shape = (*shape[:-3], shape[-2], shape[-3], key.shape[-3])  # (batch..., heads, L, S)
    if check.is_empty(request):
        weights = jnp.zeros((request.batch, request.q_heads, request.query_len, request.key_len), jnp.float32)
    else:
        weights, _ = math.probabilities(request)
    if module is not None:
        collection = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
        module.sow(collection, "attention_weights", weights.reshape(scores_shape).astype(query.dtype))
    if check.is_empty(request):
        return jnp.zeros(shape, query.dtype)
    if rate > 0 and broadcast:
        keep = jax.random.bernoulli(rng, 1.0 - rate, (1,) * (len(scores_shape) - 2) + scores_shape[-2:])  # Flax's very draw
        survivor = 0.0 if rate == 1 else 1.0 / (1.0 - rate)
        weights = jnp.where(keep.reshape(1, 1, *keep.shape[-2:]), weights * survivor, 0)
    else:
        weights = math.dropped(request, weights)
    return math.mixture(request, weights).reshape(shape)


attention_fn = AttentionFn()
"""The adapter with nothing set: `nnx.MultiHeadAttention(..., attention_fn=attention_fn)`, the same in linen's layer."""
