"""CUDNN_ATTENTION: cuDNN's FlashAttention-2 kernels, through the primitives below JAX's own cuDNN attention.

Source: docs.nvidia.com/cudnn/frontend (operations/Attention), jax/_src/cudnn/fused_attention_stablehlo.py, XLA's cuda_dnn.cc.
The backward runs from the forward's (out, lse). Both memory layouts go to cuDNN as they are.

cuDNN's function is not quite ours. Where the difference can be taken away exactly, in XLA around the call, it is; every other
call is refused. What it does, seen on an H200 with cuDNN 9.19 and jax 0.11.2 (`tests/test_cudnn.py`, marker `gpu`):

    what cuDNN does                                                              what is done here
    a key or value behind a length, multiplied by a weight of 0: NaN gets out    zeros in its place
    a row without keys: out 0, and lse 0 or -inf, by the kind of mask            out 0, lse -inf, gradients 0
    a negative scale with a causal mask: NaN everywhere                          the sign goes to the query, which is exact
    bfloat16 bias under -2.36e38 (finfo.min): overflows in base 2                such bias is raised to -2.3e38; see _FLOOR
    float32 bias with half inputs: its gradient is wrong                         refused
    backward, no causal mask, S % 128 == 64, lse < -88: dq NaN                   it is told that the lengths are L and S
    backward, with that flag: a sequence without keys gets no gradients written  zeros in their place
    backward without XLA's determinism flag: dq has other bits each time         refused
    forward of one query: lse and out have other bits each time, flag or not     refused
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa import compat
from jax_sdpa.context import SDPBackend
from jax_sdpa.device import Device
from jax_sdpa.implementations import scores
from jax_sdpa.implementations.base import Implementation, Tangents, symbolic_sizes
from jax_sdpa.implementations.efficient import Efficient
from jax_sdpa.masks import Band, KeyLengths, QueryLengths
from jax_sdpa.request import SdpaRequest

DTYPES = ("float16", "bfloat16")
ARCHITECTURE = (8, 0)
CUDNN_VERSION = 91501  # torch's floor for taking cuDNN by itself: 9.15.0 and older compute some shapes wrong (pytorch #166211)
BLACKWELL_DETERMINISTIC = 91801  # the first with a deterministic backward for sm100 (TransformerEngine #2584)
WIDE = (9, 10)  # the majors of Hopper and Blackwell: head dims up to 256, and Ev != E
GRID = 65535  # blocks along y or z of a CUDA grid: the backward's launch fails above
_FLOOR = -2.3e38
"""No finite bias reaches cuDNN below this: cuDNN multiplies by log2(e), and -3.4e38 * 1.44 is -inf, a masked key.

What this changes: among keys whose bias all lies between here and -3.4e38, in a row that has no other key, the softmax no longer
tells them apart. A row filled with finfo.min, which is what people write, stays a row of equals."""


@dataclasses.dataclass(frozen=True)
class _Masks:
    """A request's structured masks in cuDNN's words, and what those can't say."""

    causal: bool = False
    window: int | None = None  # with causal: keys (q - window, q]
    keys: tuple[KeyLengths, ...] = ()
    queries: tuple[QueryLengths, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def padded(self) -> bool:
        return bool(self.keys or self.queries)


def _read(request: SdpaRequest) -> _Masks:
    """Reads kinds and static fields only; the sizes are numbers."""
    L, S = request.query_len, request.key_len
    left, right = L, S  # the band q - left <= k <= q + right; these are wide enough to hide nothing
    keys, queries, reasons = [], [], []
    for mask in request.masks:
        if isinstance(mask, KeyLengths):
            keys.append(mask)
            if mask.starts is not None:
                reasons.append("cuDNN attention does not support padding before the keys (KeyLengths with starts).")
        elif isinstance(mask, QueryLengths):
            queries.append(mask)
            if mask.starts is not None:
                reasons.append("cuDNN attention does not support padding before the queries (QueryLengths with starts).")
        elif not isinstance(mask, Band):
            reasons.append(f"cuDNN attention does not support {mask.title} masks.")
        elif not isinstance(mask.offset, int):
            reasons.append("cuDNN attention does not support a causal mask or window with an offset for each sequence.")
        else:
            left = left if mask.left < 0 else min(left, mask.left - mask.offset)
            right = right if mask.right < 0 else min(right, mask.right + mask.offset)
    causal, windowed = right < S - 1, left < L - 1
    if causal and right != 0:
        reasons.append(
            "cuDNN attention supports causal masks that start in the upper left corner (k <= q), "
            f"the last key of query q is q {right:+d} here."
        )
    if windowed and not (causal and left >= 0):
        reasons.append("cuDNN attention supports windows only to the left of a causal mask's diagonal, and including it.")
    elif windowed and L > S:
        reasons.append(f"cuDNN attention supports windows only where L <= S, got L={L}, S={S}.")
    return _Masks(causal, left + 1 if windowed else None, tuple(keys), tuple(queries), tuple(reasons))


def _dense(request: SdpaRequest) -> list[Any]:
    return [array for array in (request.bias, request.keep_mask) if array is not None]


class Cudnn(Implementation):
    """cuDNN on NVIDIA GPUs: half precision, causal and left windows, lengths, dense masks of the full L x S."""

    backend = SDPBackend.CUDNN_ATTENTION
    heading = "cuDNN attention kernel not used because:"

    def reasons_against(self, request: SdpaRequest, device: Device) -> list[str]:
        reasons = _device_reasons(device) + _option_reasons(request)
        if sizes := symbolic_sizes(request):
            return [*reasons, f"cuDNN attention needs sizes that are numbers, {', '.join(sizes)} here are symbolic."]
        reasons += [*_read(request).reasons, *_size_reasons(request, device), *_dense_reasons(request)]
        return reasons + (_gradient_reasons(request, device) if request.spec.wrt else [])

    def notes(self, request: SdpaRequest, device: Device) -> tuple[str, ...]:
        return ("Forward mode and derivatives of derivatives run the XLA implementation.",)

    def run(self, request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
        call = _Call.of(request)
        q, k, v, sizes = call.operands(request)
        out, lse = compat.cudnn_attention(q, k, v, call.bias, *sizes, **call.params)
        if call.top is not None:  # the largest bias of a row that far down is its lse: the scores are less than half an ulp
            lse = jnp.where(call.top < _FLOOR, call.top, lse)
        lse = lse if call.empty is None else jnp.where(call.empty, -jnp.inf, lse)
        return (out if call.empty is None else scores.existing_only(request, lse, out)), lse

    def tangent(self, request: SdpaRequest, out: jax.Array, lse: jax.Array, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
        return _XLA.tangent(request, out, lse, tangents)

    def backward(
        self, request: SdpaRequest, out: jax.Array, lse: jax.Array, dout: Any, dlse: Any, wrt: tuple[str, ...]
    ) -> Tangents:
        if dout is None or dlse is not None:  # a derivative of a derivative: cuDNN's backward knows dout alone
            return _XLA.backward(request, out, lse, dout, dlse, wrt)
        call = _Call.of(request)
        q, k, v, sizes = call.operands(request)
        if sizes[0] is None and not call.params["causal"]:
            # told that nothing is padded, cuDNN leaves the tail of its last tile unmasked: exp(0 - lse) overflows where lse < -88
            sizes = _lengths((), request.query_len, request.batch), _lengths((), request.key_len, request.batch)
        shift = lse
        if call.empty is not None:
            q, dout = (scores.existing_only(request, lse, x) for x in (q, dout))
            shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # exp(anything - inf) = 0
        found = compat.cudnn_attention_backward(
            q, k, v, call.bias, *sizes, out, shift, dout, **call.params, with_dbias="bias" in wrt
        )  # fmt: skip
        grads: Tangents = dict(zip(("query", "key", "value", "bias"), found, strict=False))
        grads["query"] = -grads["query"] if call.negative else grads["query"]
        if call.empty is not None:
            grads["query"] = scores.existing_only(request, lse, grads["query"])
        grads["key"], grads["value"] = (scores.seen_only(request, grads[name]) for name in ("key", "value"))
        if "bias" in wrt:  # of the bias and the mask together
            shared = tuple(i for i, (own, n) in enumerate(zip(request.bias.shape, found[3].shape, strict=True)) if own != n)
            grads["bias"] = jnp.sum(found[3].astype(jnp.float32), shared, keepdims=True).astype(request.bias.dtype)
        return {name: grads[name] for name in wrt}


_XLA = Efficient()
"""What differentiates where cuDNN can't: in forward mode, and a derivative."""


# --- limits


def _device_reasons(device: Device) -> list[str]:
    if device.platform != "cuda":
        return [f"cuDNN attention runs on NVIDIA GPUs, the program is for {device}."]
    reasons = []
    if device.architecture is None:
        reasons.append(
            "The GPU's architecture is not known here; trace inside jax_sdpa.device.assume_device('cuda:sm90:cudnn91900') to say "
            "which it is."
        )
    elif device.architecture < ARCHITECTURE:
        reasons.append(f"cuDNN attention runs on Ampere and newer GPUs (sm80), the program is for {device}.")
    if device.cudnn is None:
        reasons.append("cuDNN's version is not known here, or there is none; a name says it, as in 'cuda:sm90:cudnn91900'.")
    elif device.cudnn < CUDNN_VERSION:
        reasons.append(f"cuDNN attention needs cuDNN {_dotted(CUDNN_VERSION)} or newer, this is {_dotted(device.cudnn)}.")
    return reasons


def _dotted(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _option_reasons(request: SdpaRequest) -> list[str]:
    spec, reasons = request.spec, []
    if request.query.dtype.name not in DTYPES:
        reasons.append(f"Expected query, key and value to all be of dtype: {{Half, BFloat16}}. Got {request.query.dtype}.")
    if request.dropout_seeds is not None:
        reasons.append("cuDNN attention drops other weights than the other backends would for the same key.")
    if request.sinks is not None:
        reasons.append("cuDNN attention does not support sinks.")
    if spec.part:
        reasons.append("cuDNN attention is not used for a part of the keys: its backward has not been tried there.")
    if spec.softcap is not None:
        reasons.append("cuDNN attention does not support softcap.")
    if spec.scale is None:
        reasons.append("cuDNN attention needs a scale that is known while tracing, a Python number.")
    elif not 0 < abs(spec.scale) < float("inf"):
        reasons.append(f"cuDNN attention needs a scale that is finite and not 0, got {spec.scale}.")
    return reasons


def _size_reasons(request: SdpaRequest, device: Device) -> list[str]:
    E, Ev, reasons = request.head_dim, request.value_head_dim, []
    if request.query_len == 1:  # it splits the keys among blocks that add up in the order in which they are done
        reasons.append("cuDNN attention does not give the same bits each time for a single query.")
    wide = device.architecture is None or device.architecture[0] in WIDE
    most = 256 if wide else 128
    if any(not 0 < size <= most or size % 8 for size in (E, Ev)):
        reasons.append(f"cuDNN attention requires head dims that are multiples of 8 and at most {most}. Got {E} and {Ev}.")
    if Ev != E and not wide:
        reasons.append(f"cuDNN attention requires query, key and value to have the same head dim on {device}. Got {E} and {Ev}.")
    return reasons


def _dense_reasons(request: SdpaRequest) -> list[str]:
    reasons, L, S = [], request.query_len, request.key_len
    if request.bias is not None and request.bias.dtype != request.query.dtype:
        reasons.append(
            f"cuDNN attention requires a float mask of the query's dtype, {request.query.dtype}. Got {request.bias.dtype}."
        )
    if not (dense := _dense(request)):
        return reasons
    full = tuple(max(sizes) for sizes in zip(*(array.shape for array in dense), strict=True))
    if full[2:] != (L, S):
        reasons.append(
            f"cuDNN attention requires a mask with every query and key, (…, {L}, {S}), no broadcast ones. Got (…, {full[2]}, "
            f"{full[3]}); for padding and causal masks pass the structured masks of jax_sdpa.attention.bias."
        )
    if all(array.shape[:2] != full[:2] for array in dense):
        reasons.append(f"cuDNN attention would have to combine the mask and the bias into one array of {full}.")
    return reasons


def _gradient_reasons(request: SdpaRequest, device: Device) -> list[str]:
    reasons, wrt = [], request.spec.wrt
    blackwell = device.architecture is not None and device.architecture[0] >= 10
    if not device.deterministic:
        reasons.append(
            "cuDNN attention's backward does not give the same bits each time; XLA_FLAGS=--xla_gpu_deterministic_ops=true makes it."
        )
    elif blackwell and device.cudnn is not None and device.cudnn < BLACKWELL_DETERMINISTIC:
        reasons.append(f"cuDNN attention's backward is deterministic on {device} from cuDNN {_dotted(BLACKWELL_DETERMINISTIC)} on.")
    elif blackwell and "bias" in wrt:
        reasons.append(f"cuDNN attention has no deterministic gradient of a float mask on {device}.")
    if request.spec.returns_lse:
        reasons.append("cuDNN attention's backward does not support a cotangent of lse.")
    if max(request.batch, request.q_heads) > GRID:
        reasons.append(f"cuDNN attention's backward supports at most {GRID} batch elements and as many heads.")
    if request.bias is not None and request.bias.dtype == jnp.bfloat16:
        reasons.append(
            "cuDNN attention's backward divides by the softmax's sum through lse, which is lost in a row filled with a bfloat16 "
            "number such as -1e9; a bool mask, -inf or float16 has no such row."
        )
    if request.bias is not None and (request.query_len % 2 or request.key_len % 2):
        reasons.append(
            "cuDNN attention's backward requires even lengths with a float mask. "
            f"Got L={request.query_len} and S={request.key_len}."
        )
    return reasons


# --- the call


def _lengths(masks: tuple[Any, ...], length: int, batch: int) -> jax.Array:
    """int32 (B,) in [0, length]: the shortest that the masks say."""
    shortest = jnp.full((batch,), length, jnp.int32)
    for mask in masks:
        own = mask.lengths.astype(jnp.promote_types(mask.lengths.dtype, jnp.int32))  # else `length` may not fit, in an int8 say
        shortest = jnp.minimum(shortest, jnp.clip(own, 0, length).astype(jnp.int32))
    return shortest


@dataclasses.dataclass(frozen=True)
class _Call:
    """What forward and backward give to cuDNN beside q, k and v, and what XLA knows of the rows beforehand."""

    params: dict[str, Any]
    negative: bool  # scale; its sign goes to the query
    lengths: tuple[Any, Any]  # of queries and keys, int32 (B,) each, or None
    bias: Any  # (B|1, Hq|1, L, S) in the query's dtype, -inf where a dense mask hides a key; or None
    top: Any  # (B|1, Hq|1, L) float32: the largest bias that a query sees, -inf without any; None where none is below _FLOOR
    empty: Any  # (B|1, Hq|1, L|1) bool: rows that attend to nothing; None where there can't be one

    @classmethod
    def of(cls, request: SdpaRequest) -> _Call:
        masks, L, S, B = _read(request), request.query_len, request.key_len, request.batch
        params = {
            "scale": abs(request.spec.scale),  # type: ignore[arg-type]
            "causal": masks.causal,
            "window": masks.window,
            "layout": "BNTH" if request.spec.layout == "BHLE" else "BTNH",
        }
        lengths: tuple[Any, Any] = (None, None)
        if masks.padded:
            lengths = _lengths(masks.queries, L, B), _lengths(masks.keys, S, B)
        bias, top, empty = _bias(request), None, None
        if bias is not None:
            keep = request.mask.keep(*(lax.broadcasted_iota(jnp.int32, (L, S), i) for i in (0, 1))) if request.masks else True
            seen = jnp.where(keep, bias.astype(jnp.float32), -jnp.inf)
            top = jnp.max(seen, -1)
            empty = jnp.isneginf(top)
            if request.bias is None or bias.dtype != jnp.bfloat16:  # float16 ends at -65504
                top = None
            else:
                bias = jnp.where(jnp.isneginf(bias), bias, jnp.maximum(bias, jnp.asarray(_FLOOR, bias.dtype)))
        elif masks.padded:
            empty = (jnp.arange(L) >= lengths[0][:, None, None]) | (lengths[1] == 0)[:, None, None]
        return cls(params, request.spec.scale < 0, lengths, bias, top, empty)  # type: ignore[operator]

    def operands(self, request: SdpaRequest) -> tuple[Any, Any, Any, tuple[Any, Any]]:
        """q, and k and v with zeros where no query looks, and the lengths."""
        q = -request.query if self.negative else request.query
        return q, scores.seen_only(request, request.key), scores.seen_only(request, request.value), self.lengths


def _bias(request: SdpaRequest) -> Any:
    """The dense masks as one addend."""
    bias = request.bias
    if request.keep_mask is not None:
        hidden = jnp.where(request.keep_mask, jnp.zeros((), request.query.dtype), -jnp.inf)
        bias = hidden if bias is None else bias + hidden
    return bias
