"""From a user's arguments to an `SdpaRequest`: ranks, broadcasting, grouped heads, masks made values; every error is here."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sdpa import compat, dropout
from jax_sdpa.check_operands import as_array, operands, scales_of_keys, with_one_batch
from jax_sdpa.context import DEVICE, KERNEL, TOGGLES, Allowed, SDPBackend, allowed_now
from jax_sdpa.masks import And, Band, Dense, KeyLengths, Mask, QueryLengths, causal
from jax_sdpa.request import SdpaRequest, SdpaSpec


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"argument '{name}' must be a (static) bool, not {type(value).__name__}.")
    return bool(value)


def _number(value: Any, name: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"argument '{name}' must be a (static) number, not {type(value).__name__}.")
    return float(value)


def _scale(scale: Any, E: int, dtype: Any) -> tuple[float | None, jax.Array | None]:
    """(static scale, None) or (None, the traced scale, (1,) float32 or float64)."""
    if scale is None:
        return (1.0 / math.sqrt(E) if E else 1.0), None  # E = 0: every score is 0, whatever the scale
    if isinstance(scale, numbers.Real):
        return float(scale), None
    if isinstance(scale, (jax.Array, np.ndarray)) and scale.ndim == 0 and not jnp.issubdtype(scale.dtype, jnp.complexfloating):
        return None, jnp.asarray(scale, jnp.float64 if dtype == jnp.float64 else jnp.float32)[None]
    got = f"shape {scale.shape} {scale.dtype}" if hasattr(scale, "shape") else type(scale).__name__
    raise TypeError(f"argument 'scale' must be a number or a real scalar array, not {got}.")


def _broadcast_batch(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Any, ...]:
    try:
        return jnp.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except ValueError:
        raise ValueError(
            f"query, key and value must have batch dims that broadcast, got {q.shape[:-3]}, {k.shape[:-3]} and {v.shape[:-3]}."
        ) from None


def _heads(Hq: int, Hk: int, Hv: int, enable_gqa: bool) -> tuple[int, int, int]:
    """(query heads, key heads, value heads) after broadcasting, of which the last two are then repeated to one number."""
    if enable_gqa:
        if 0 in (Hk, Hv) or Hq % Hk or Hq % Hv:
            raise ValueError(
                "Number of heads in key and value must divide the number of heads in query, "
                f"got Hq={Hq}, Hk={Hk}, Hv={Hv} with enable_gqa=True."
            )
        H = math.lcm(Hk, Hv)
        return Hq, H, H
    sizes = {size for size in (Hq, Hk, Hv) if size != 1}
    if len(sizes) > 1:
        grouped = Hk == Hv and Hk and Hq % Hk == 0
        fix = "Try setting enable_gqa=True for GQA." if grouped else "They must be equal or 1."
        raise ValueError(f"Expect query, key and value to have the same number of heads, but got Hq={Hq}, Hk={Hk}, Hv={Hv}. {fix}")
    widest = max((Hq, Hk, Hv), key=lambda size: size != 1)
    return (widest, 1, 1) if Hk == Hv == 1 else (widest, widest, widest)


def _flat(x: jax.Array, batch: tuple[Any, ...], heads: int, heads_axis: int) -> jax.Array:
    """(…, heads and length, E) -> (B, …): batch broadcast and flattened, heads repeated where they must be."""
    core = list(x.shape[-3:])
    repeats = 1
    if core[heads_axis - 1] != heads:
        repeats = heads // core[heads_axis - 1]
        x = jnp.repeat(x, repeats, axis=x.ndim - 4 + heads_axis)
        core[heads_axis - 1] = heads
    if x.shape[:-3] != batch:
        x = jnp.broadcast_to(x, (*batch, *core))
    return x if len(batch) == 1 else jnp.reshape(x, (math.prod(batch), *core))


def _dense(array: Any, batch: tuple[Any, ...], core: tuple[Any, Any, Any], rank: int, name: str) -> jax.Array:
    """A dense mask or bias, broadcastable into (…, Hq, L, S), as (B|1, Hq|1, L|1, S|1)."""
    Hq = core[0]
    full = (*batch, *core)[-rank:]
    fits = array.ndim <= rank and all(m in (1, f) for m, f in zip(array.shape[::-1], full[::-1], strict=False))
    if not fits:
        hint = ""
        if rank > 3 and array.ndim == 3 and array.shape[0] == batch[-1] and array.shape[0] != Hq:
            hint = f" Its first dim stands for heads; for a mask per batch element pass {name}[:, None]."
        raise ValueError(
            f"{name} must broadcast into the scores' shape {full} (batch..., heads, L, S) without enlarging it, "
            f"got {tuple(array.shape)}.{hint}"
        )
    array = jnp.reshape(array, (1,) * (len(batch) + 3 - array.ndim) + array.shape)
    return with_one_batch(array, batch)


def _split_mask(
    mask: Mask | None, batch: tuple[Any, ...], core: tuple[Any, Any, Any], rank: int, dtype: Any, name: str
) -> tuple[jax.Array | None, jax.Array | None, tuple[Mask, ...]]:
    """A mask value -> (bias, keep_mask, structured masks), each canonical."""
    bias, keep, structured = None, None, []
    for part in () if mask is None else mask.parts(core[1], core[2]):
        if not isinstance(part, Dense):
            structured.append(part.with_batch(batch))
            continue
        array = as_array(part.array, name)
        if array.dtype == bool:
            array = _dense(array, batch, core, rank, name)
            keep = array if keep is None else keep & array
        elif array.dtype in (dtype, jnp.float32):
            array = _dense(array, batch, core, rank, name)
            bias = array if bias is None else bias + array
        else:
            raise TypeError(
                f"Expected {name} dtype to be bool or float32 or to match query dtype, but got {name}.dtype: {array.dtype} and "
                f"query.dtype: {dtype} instead. A 0/1 mask means {name}.astype(bool)."
            )
    return bias, keep, tuple(structured)


def _mask_value(mask: Any, name: str) -> Mask:
    return mask if isinstance(mask, Mask) else Dense(as_array(mask, name))


def _dropout(p: Any, key: Any, batch: tuple[Any, ...], Hq: int) -> tuple[float, jax.Array | None]:
    """(p, the seeds (B, Hq, 2) by which the mask is addressed), (0.0, None) without dropout."""
    p = _number(p, "dropout_p")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}.")
    if p == 0.0:
        return 0.0, None
    if key is None:
        raise ValueError(
            f"dropout_p={p} needs a key: pass dropout_rng=jax.random.key(...). "
            "(torch draws from a global generator; JAX's keys are explicit.)"
        )
    if isinstance(key, dropout.KeyAt):
        return p, key.seeds(math.prod(batch), Hq)
    return p, dropout.seeds(key, math.prod(batch), Hq)


def make_request(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layout: str,
    enable_gqa: bool,
    mask: Mask | None,
    mask_name: str,
    allowed: Allowed,
    scale: Any,
    dropout_p: Any = 0.0,
    dropout_rng: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    returns_lse: bool = False,
    key_scale: Any = None,
    value_scale: Any = None,
) -> SdpaRequest:
    heads_axis = 1 if layout == "BHLE" else 2
    rank = max(q.ndim, k.ndim, v.ndim)
    q, k, v = (jnp.reshape(x, (1,) * (max(rank, 4) - x.ndim) + x.shape) if x.ndim < max(rank, 4) else x for x in (q, k, v))
    length, heads = -1 - heads_axis, -4 + heads_axis  # of the last three axes: (H, L, E) or (L, H, E)
    L, S, E = q.shape[length], k.shape[length], q.shape[-1]
    if k.shape[-1] != E:
        raise ValueError(f"query and key must have the same head dim E, got {E} and {k.shape[-1]}.")
    if v.shape[length] != S:
        raise ValueError(f"key and value must have the same length S, got {S} and {v.shape[length]}.")
    batch = _broadcast_batch(q, k, v)
    Hq, Hk, Hv = _heads(q.shape[heads], k.shape[heads], v.shape[heads], enable_gqa)
    static_scale, traced_scale = _scale(scale, E, q.dtype)
    bias, keep_mask, masks = _split_mask(mask, batch, (Hq, L, S), rank, q.dtype, mask_name)
    p, seeds = _dropout(dropout_p, dropout_rng, batch, Hq)
    spec = SdpaSpec(
        layout=layout,
        allowed=allowed,
        scale=static_scale,
        softcap=softcap,
        dropout_p=p,
        precision=compat.default_matmul_precision() or "highest",
        low_precision_math=TOGGLES.value.low_precision_math,
        returns_lse=returns_lse,
        device=DEVICE.value,
    )
    scales: dict[str, Any] = {}
    if key_scale is not None:
        own = (("key_scale", key_scale, k.shape[heads], Hk), ("value_scale", value_scale, v.shape[heads], Hv))
        scales = {name: scales_of_keys(x, name, batch, given, repeated, S) for name, x, given, repeated in own}
    q, k, v = _flat(q, batch, Hq, heads_axis), _flat(k, batch, Hk, heads_axis), _flat(v, batch, Hv, heads_axis)
    return SdpaRequest(q, k, v, bias, keep_mask, masks, traced_scale, sinks, seeds, **scales, spec=spec)


def _torch_mask(attn_mask: Any, is_causal: Any) -> Mask | None:
    mask = None if attn_mask is None else _mask_value(attn_mask, "attn_mask")
    if not flag(is_causal, "is_causal"):
        return mask
    if mask is not None:
        raise ValueError(
            "Explicit attn_mask should not be set when is_causal=True. To combine them, pass "
            "attn_mask=causal_upper_left(L, S) & mask (torch's is_causal) or causal_lower_right(L, S) & mask (queries at the "
            "end of a KV cache), from jax_sdpa.attention.bias."
        )
    return causal()


def sharded_request(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    *,
    scale: Any,
    enable_gqa: Any,
    dropout_rng: Any,
    softcap: Any,
    sinks: Any,
    layout: Any,
    returns_lse: Any,
) -> SdpaRequest:
    """The request of context parallelism: torch's arguments and `jax.nn`'s extras, in either layout, of rank 4."""
    if layout not in ("BHLE", "BLHE"):
        raise ValueError(f"layout must be 'BHLE' (torch's) or 'BLHE' (JAX's), got {layout!r}.")
    q, k, v = operands(query, key, value, least_rank=4)
    if max(q.ndim, k.ndim, v.ndim) > 4:
        raise ValueError(
            "Expected query, key and value of rank 4, (B, H, L, E) or (B, L, H, E): a mesh axis divides one batch dim. Got ranks "
            f"{q.ndim}, {k.ndim} and {v.ndim}; reshape the batch dims into one."
        )
    if isinstance(dropout_rng, dropout.KeyAt):
        raise TypeError("dropout_rng must be a JAX key here, without offsets: the call is whole, and its parts are placed for you.")
    heads_axis = 1 if layout == "BHLE" else 2
    return make_request(
        q, k, v, layout=layout, enable_gqa=flag(enable_gqa, "enable_gqa"), mask=_torch_mask(attn_mask, is_causal),
        mask_name="attn_mask", allowed=allowed_now(), scale=scale, dropout_p=dropout_p, dropout_rng=dropout_rng,
        softcap=_softcap(softcap), sinks=_sinks(sinks, q.shape[heads_axis : heads_axis + 1]),
        returns_lse=flag(returns_lse, "return_residual"),
    )  # fmt: skip


def torch_request(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
    dropout_rng: Any = None,
) -> tuple[SdpaRequest, tuple[Any, ...]]:
    """The request of torch's face, and the shape in which its caller expects the output."""
    q, k, v = operands(query, key, value, least_rank=2)
    mask = _torch_mask(attn_mask, is_causal)
    if flag(enable_gqa, "enable_gqa") and min(q.ndim, k.ndim, v.ndim) < 3:
        raise ValueError(f"enable_gqa needs a heads dim: arrays of rank 3 and more, got {q.ndim}, {k.ndim} and {v.ndim}.")
    request = make_request(
        q, k, v, layout="BHLE", enable_gqa=enable_gqa, mask=mask, mask_name="attn_mask", allowed=allowed_now(), scale=scale,
        dropout_p=dropout_p, dropout_rng=dropout_rng,
    )  # fmt: skip
    rank = max(q.ndim, k.ndim, v.ndim)
    leading = (*_broadcast_batch(*(jnp.reshape(x, (1,) * max(0, 3 - x.ndim) + x.shape) for x in (q, k, v))), request.q_heads)
    return request, (*leading[max(0, 3 - rank) :], request.query_len, request.value_head_dim)


def _lengths(lengths: Any, name: str) -> Any:
    if lengths is None:
        return None
    lengths = as_array(lengths, name)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {lengths.dtype}.")
    return lengths


def _implementation(implementation: Any) -> Allowed:
    """`jax.nn`'s implementation= as backends; it may not contradict a surrounding `sdpa_kernel`."""
    if implementation is None:
        return allowed_now()
    named = {
        "xla": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
        "cudnn": (SDPBackend.CUDNN_ATTENTION,),
    }
    if implementation not in named:
        raise ValueError(f"implementation must be 'xla', 'cudnn' or None, got {implementation!r}.")
    around = KERNEL.value
    if around is None:
        return Allowed(named[implementation])
    chosen = tuple(backend for backend in around.backends if backend in named[implementation])
    if not chosen:
        raise ValueError(
            f"implementation={implementation!r} conflicts with the surrounding sdpa_kernel, which allows only "
            f"{[b.name for b in around.backends]}: drop one of the two."
        )
    return Allowed(chosen, around.ordered)


def _softcap(softcap: Any) -> Any:
    if softcap is not None and not (softcap := _number(softcap, "softcap")) > 0:
        raise ValueError(f"softcap must be positive (None = no cap), got {softcap}.")
    return softcap


def _sinks(sinks: Any, heads: tuple[Any, ...]) -> Any:
    """(1, Hq), float32 or float64."""
    if sinks is None:
        return None
    sinks = as_array(sinks, "sinks")
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise TypeError(f"sinks must be a float array, got {sinks.dtype}.")
    if sinks.shape != heads:
        raise ValueError(f"sinks must have one logit per query head, shape {heads}, got {sinks.shape}.")
    return sinks[None].astype(jnp.promote_types(sinks.dtype, jnp.float32))


def jax_request(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: Any = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
    implementation: Any = None,
    return_residual: Any = False,
    softcap: Any = None,
    sinks: Any = None,
    dropout_p: Any = 0.0,
    dropout_rng: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
) -> tuple[SdpaRequest, tuple[Any, ...]]:
    """The request of JAX's face, and the shape in which its caller expects the output."""
    q, k, v = operands(query, key, value, 3, key_scale, value_scale)
    parts: list[Mask] = []
    if bias is not None:
        bias = as_array(bias, "bias")
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(f"bias must be a float array, got {bias.dtype}; a bool array goes to mask.")
        parts.append(Dense(bias))
    if mask is not None:
        value_mask = _mask_value(mask, "mask")
        for part in value_mask.parts(q.shape[-3], k.shape[-3]):
            if isinstance(part, Dense) and part.array.dtype != bool:
                raise TypeError(
                    f"mask must be a bool array or a structured mask, got {part.array.dtype}; an additive one goes to bias."
                )
        parts.append(value_mask)
    if flag(is_causal, "is_causal"):
        parts.append(causal())
    if local_window_size is not None:
        window = local_window_size if isinstance(local_window_size, (tuple, list)) else (local_window_size, local_window_size)
        if len(window) != 2:
            raise ValueError(f"local_window_size must be an int or (left, right), got {local_window_size!r}.")
        parts.append(Band(left=window[0], right=window[1]))
    if (lengths := _lengths(query_seq_lengths, "query_seq_lengths")) is not None:
        parts.append(QueryLengths(lengths))
    if (lengths := _lengths(key_value_seq_lengths, "key_value_seq_lengths")) is not None:
        parts.append(KeyLengths(lengths))
    softcap, sinks = _softcap(softcap), _sinks(sinks, q.shape[-2:-1])
    request = make_request(
        q, k, v, layout="BLHE", enable_gqa=True, mask=And(tuple(parts)) if parts else None, mask_name="mask or bias",
        allowed=_implementation(implementation), scale=scale, dropout_p=dropout_p, dropout_rng=dropout_rng, softcap=softcap,
        sinks=sinks, returns_lse=flag(return_residual, "return_residual"), key_scale=key_scale, value_scale=value_scale,
    )  # fmt: skip
    batch = _broadcast_batch(q, k, v)
    return request, (*batch, request.query_len, request.q_heads, request.value_head_dim)


def is_empty(request: SdpaRequest) -> bool:
    """No score at all (L, S or the batch is 0) or no output: the answer is zeros."""
    sizes = (request.batch, request.q_heads, request.query_len, request.key_len, request.value_head_dim)
    return any(not compat.is_symbolic(size) and size == 0 for size in sizes)
