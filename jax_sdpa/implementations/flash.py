"""FLASH_ATTENTION: our Pallas kernels for Hopper, forward and backward. What the backward kernels do not take yet, forward mode and
second derivatives run the XLA implementation, from the saved lse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_sdpa import compat, dropout
from jax_sdpa.context import SDPBackend
from jax_sdpa.device import Device, deterministic_ops
from jax_sdpa.implementations import efficient_backward, scores
from jax_sdpa.implementations.base import Implementation, Tangents, symbolic_sizes
from jax_sdpa.implementations.efficient import Efficient
from jax_sdpa.request import SdpaRequest
from pallas_kernels import dense, flash_attention, flash_backward, flash_decode
from pallas_kernels.contracts import SCALES_OF_PAGE, has_ids
from pallas_kernels.decode_tuning import ROWS_OF_EIGHT_BITS

DTYPES = ("float16", "bfloat16")
ARCHITECTURE = (9, 0)  # Hopper: wgmma and TMA
JAX_VERSION = (0, 11, 2)  # the first whose Mosaic GPU runs the kernels (interpret mode included)
HEAD_DIM = 256
SOFTCAP = 1000.0  # the kernel's tanh is 1 - 2 / (1 + e**2x): its error is softcap * 1e-7 however small the score


@dataclasses.dataclass(frozen=True)
class Flash(Implementation):
    """The Hopper kernels: half precision, every mask, bias, dropout, sinks and softcap, both layouts, grouped heads.

    interpret: `plgpu.InterpretGPUParams`; `run` and `backward` then go through Mosaic's interpreter, on any device. For tests: a
    primitive's lowering has no place for the interpreter's ordered effects, so the public functions never interpret.
    """

    interpret: Any = None
    backend = SDPBackend.FLASH_ATTENTION
    heading = "Flash attention kernel not used because:"

    def reasons_against(self, request: SdpaRequest, device: Device) -> list[str]:
        reasons = []
        if device.platform != "cuda":
            reasons.append(f"Flash attention runs on NVIDIA GPUs, the program is for {device}.")
        elif device.architecture is None:
            reasons.append("The GPU's architecture is not known here: trace inside jax_sdpa.device.assume_device('cuda:sm90').")
        elif device.architecture != ARCHITECTURE:
            reasons.append(f"Flash attention runs on Hopper GPUs (sm90), the program is for {device}.")
        if compat.JAX_VERSION < JAX_VERSION:
            reasons.append(f"Flash attention needs jax {'.'.join(map(str, JAX_VERSION))} or newer, this is jax {jax.__version__}.")
        if request.query.dtype.name not in DTYPES:
            reasons.append(f"Expected query, key and value to all be of dtype: {{Half, BFloat16}}. Got {request.query.dtype}.")
        if request.spec.scale is not None and not math.isfinite(request.spec.scale):
            reasons.append(f"Flash attention needs a scale that is finite, got {request.spec.scale}.")
        if request.spec.softcap is not None and request.spec.softcap > SOFTCAP:
            reasons.append(f"Flash attention requires a softcap of at most {SOFTCAP:g}, got {request.spec.softcap}.")
        if sizes := symbolic_sizes(request):
            reasons.append(f"Flash attention needs sizes that are numbers, {', '.join(sizes)} here are symbolic.")
        elif not 0 < min(request.head_dim, request.value_head_dim) <= max(request.head_dim, request.value_head_dim) <= HEAD_DIM:
            reasons.append(
                f"Flash attention requires head dims from 1 to {HEAD_DIM}. Got {request.head_dim} and {request.value_head_dim}."
            )
        return reasons

    def notes(self, request: SdpaRequest, device: Device) -> tuple[str, ...]:
        decodes, sizes, wrt = _is_decode(request), (request.key_len, request.head_dim, request.value_head_dim), request.spec.wrt
        eight_bits = self.takes_eight_bits(request)
        if decodes:
            names = () if self.takes_pages(request) else flash_decode.padding(*sizes, eight_bits=eight_bits)
        else:
            names = flash_attention.padding(request.query_len, *sizes, dense.tile_bytes(request.bias))
        reasons = _against_kernels(request, wrt or tuple(name for name in ("bias", "scale") if getattr(request, name) is not None))
        notes = []
        if wrt and reasons:
            notes = [f"Gradients run the XLA implementation, all of them, from the saved lse: {' '.join(reasons)}"]
        elif request.pages is None:  # those are for inference
            notes = ["Gradients run the kernels; forward mode and second derivatives the XLA implementation, from the saved lse."]
            if reasons:
                notes += [f"All gradients of a call run the XLA implementation if one of them is not here: {' '.join(reasons)}"]
        if decodes:
            shared = "one sequence after another" if request.spec.batch_invariant else "shared out over the chip"
            notes.append(f"The decode kernels run it: keys are read once for a group's heads, {shared}.")
        if eight_bits:
            if self.takes_pages(request) and request.key.shape[1] < SCALES_OF_PAGE:
                notes.append(f"The scales of pages of fewer than {SCALES_OF_PAGE} keys are gathered.")
            if flash_decode.copies_scales(request.key_scale, request.value_scale, request.key_len, request.pages):
                of = "a pool's too, " if request.pages is not None else ""
                notes.append(f"Scales are written out for each key, {of}in float32: they are shared by keys, or of another dtype.")
        if names:
            step = "thirty-twos, of values beyond 128 in 128s" if eight_bits else "sixteens"
            notes.append(f"A padded copy is made of {', '.join(names)}: lengths are wanted in eights, head dims in {step}.")
        if request.pages is None and not (wrt and reasons):
            if dense.tile_bytes(request.bias) and request.bias.shape[0] != request.batch and (not wrt or "bias" in wrt):
                notes.append("The gradient of a bias that batch entries share is made for one after the other, and added up.")
            if _adds_in_any_order(request, device) and (not wrt or set(flash_backward.WANTS) <= set(wrt)):
                notes.append(
                    "Gradients of query, key and value together add up the query's in any order, so its last bits vary from run to "
                    "run; XLA_FLAGS=--xla_gpu_deterministic_ops=true runs slower kernels that give the same bits each time."
                )
        return tuple(notes)

    def against_batch_invariance(self, request: SdpaRequest) -> list[str]:
        """Of the kernels, those for a decode keep it.

        They read a sequence's tiles whole, in one order, counted from its own first key, from the first one that its first query
        sees to its last key. How a tile is cut and added up hangs on the head dims alone, not on the batch, nor on how many queries
        or pages the others have: a row of a product is none of the other rows' business, and a tile that is masked without need
        keeps its scores. Nor may the choice of these kernels hang on the others' keys (`_is_decode`); where it would on their
        queries, the call is refused.
        """
        if symbolic_sizes(request):
            return []  # refused for that
        if has_ids(request.mask):
            return ["num_splits=1: tiles of packed keys begin where the batch does, so a sequence's bits hang on the others."]
        if not _is_decode(request):
            most = f"at most {flash_decode.QUERIES} queries a sequence, {flash_decode.ROWS} with the heads of a group"
            got = f"{request.query_len} and {request.group * request.query_len}"
            return [f"num_splits=1, the same bits for a sequence in any batch, is kept by the decode kernels: {most}. Got {got}."]
        if self._widens_for_its_rows(request):
            return [
                "num_splits=1, the same bits for a sequence in any batch: a cache of 8 bits is read as it is with at most "
                f"{ROWS_OF_EIGHT_BITS} queries with the heads of a group. Got {request.group * request.query_len}."
            ]
        return []

    def _widens_for_its_rows(self, request: SdpaRequest) -> bool:
        """Whether a cache of 8 bits is widened first because of how many queries there are: with fewer it would not be."""
        return request.key_scale is not None and request.query.dtype == jnp.bfloat16 and not self.takes_eight_bits(request)

    def takes_pages(self, request: SdpaRequest) -> bool:
        if request.pages is None or symbolic_sizes(request) or compat.is_symbolic(request.key.shape[0]):
            return False
        eight_bits = request.key_scale is not None
        if eight_bits and not self.takes_eight_bits(request):
            return False  # what is gathered is less to widen than a pool
        pages, page, _, E = request.key.shape
        return _is_decode(request) and flash_decode.takes_pages(
            pages=pages, page=page, head_dim=E, value_head_dim=request.value_head_dim, eight_bits=eight_bits
        )

    def takes_eight_bits(self, request: SdpaRequest) -> bool:
        if request.key_scale is None or symbolic_sizes(request) or not _is_decode(request):
            return False
        dims = {"head_dim": request.head_dim, "value_head_dim": request.value_head_dim}
        return flash_decode.takes_eight_bits(query_dtype=request.query.dtype, rows=request.group * request.query_len, **dims)

    def run(self, request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
        spec = request.spec
        if _is_decode(request):
            return flash_decode.decode(
                request.query, request.key, request.value, layout=spec.layout,
                scale=request.scale if spec.scale is None else spec.scale, softcap=spec.softcap,
                mask=request.mask if request.masks else None, sinks=request.sinks, pages=request.pages,
                key_scale=request.key_scale, value_scale=request.value_scale,
                whole=spec.batch_invariant, interpret=self.interpret,
            )  # fmt: skip
        return flash_attention.forward(
            request.query, request.key, request.value, layout=spec.layout,
            scale=request.scale if spec.scale is None else spec.scale, softcap=spec.softcap,
            mask=request.mask if request.masks else None, bias=request.bias, keep=request.keep_mask, sinks=request.sinks,
            seeds=request.dropout_seeds, dropout_p=spec.dropout_p, generator=dropout, interpret=self.interpret,
        )  # fmt: skip

    def tangent(self, request: SdpaRequest, out: jax.Array, lse: jax.Array, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
        return _XLA.tangent(request, out, lse, tangents)

    def backward(
        self, request: SdpaRequest, out: jax.Array, lse: jax.Array, dout: Any, dlse: Any, wrt: tuple[str, ...]
    ) -> Tangents:
        if _against_kernels(request, wrt):
            return _XLA.backward(request, out, lse, dout, dlse, wrt)
        spec = request.spec
        dout = jnp.zeros_like(out) if dout is None else dout
        empty = scores.empty_rows(request, lse) if _may_be_empty(request) else None
        delta = scores.row_deltas(request, out, lse, dout, dlse, empty)
        found: Tangents = {}
        if "sinks" in wrt:
            found["sinks"] = efficient_backward.sinks_gradient(request, lse, delta)
        wants = tuple(name for name in (*flash_backward.WANTS, "bias") if name in wrt)
        row_sum = None
        if request.bias is not None:
            lse, row_sum = _XLA.row_sums(request, lse)
        return found | flash_backward.backward(
            request.query, request.key, request.value, dout, lse, delta, layout=spec.layout,
            scale=request.scale if spec.scale is None else spec.scale, softcap=spec.softcap,
            mask=request.mask if request.masks else None, bias=request.bias, row_sum=row_sum, keep=request.keep_mask,
            seeds=request.dropout_seeds, dropout_p=spec.dropout_p, generator=dropout, empty=empty, wants=wants,
            deterministic=deterministic_ops(), interpret=self.interpret,
        )  # fmt: skip


def _against_kernels(request: SdpaRequest, wrt: tuple[str, ...]) -> list[str]:
    """Why the gradients of `wrt` cannot come from the kernels, in plain sentences."""
    reasons = []
    if "scale" in wrt:
        reasons.append("the backward kernels have no gradient of a traced scale.")
    return reasons


def _adds_in_any_order(request: SdpaRequest, device: Device) -> bool:
    """Whether the backward is the fused kernel."""
    drops = request.spec.dropout_p > 0 and dropout.rounded(request.spec.dropout_p) < 1
    config = flash_backward.chosen(
        heads=request.batch * request.q_heads, group=request.group, query_len=request.query_len, key_len=request.key_len,
        head_dim=request.head_dim, value_head_dim=request.value_head_dim, mask=request.mask if request.masks else None,
        bias=request.bias, keep=request.keep_mask, drops=drops, capped=request.spec.softcap is not None,
        deterministic=device.deterministic,
    )  # fmt: skip
    return config.fused is not None


def _is_decode(request: SdpaRequest) -> bool:
    """Whether the decode kernels run it: few queries, many keys; any number of them if it must not hang on the batch."""
    return flash_decode.takes(
        query_len=request.query_len, key_len=request.key_len, group=request.group, has_ids=has_ids(request.mask),
        dense=request.bias is not None or request.keep_mask is not None, drops=request.dropout_seeds is not None,
        whole=request.spec.batch_invariant,
    )  # fmt: skip


def _may_be_empty(request: SdpaRequest) -> bool:
    """Whether the masks, or -inf in a bias, may leave a query without keys, as far as that is known without their arrays. A static
    mask is bands and intervals, whose rows are shortest at the ends."""
    if request.keep_mask is not None or request.bias is not None or jax.tree.leaves(request.masks):
        return True
    L, S = request.query_len, request.key_len
    ranges = (request.mask.kv_range(q, q + 1, L, S) for q in (0, L - 1))
    return any(lo >= hi for lo, hi in ranges)


_XLA = Efficient(on_cpu=False)
"""What differentiates: it keeps the same residuals."""
