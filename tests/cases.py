"""Named calls that every backend must answer: (problem, the structured mask to ask with, options of `on_jax`).

The problem's `keep` is a picture drawn by the oracle's own functions; the structured mask says the same to jax_sdpa. Lengths are
such as break a blockwise backend: 1, 7, and one less and more than a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from harness import make
from oracle import Problem, band, lengths, packed, same_segment

from jax_sdpa.attention.bias import (
    Dense,
    KeyLengths,
    Mask,
    Packed,
    QueryLengths,
    SegmentIds,
    causal,
    causal_lower_right,
    causal_upper_left,
    sliding_window,
)

Case = tuple[Problem, Mask | None, dict[str, Any]]
rng = np.random.default_rng(7)

SIZES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (1, 300),
    (127, 129),
    (128, 128),
    (129, 127),
    (256, 255),
    (257, 513),
    (512, 256),
    (511, 257),
    (640, 1),
]
"""(L, S) around blocks of 64, 128, 256 and 512."""


def _plain(L: int, S: int) -> Case:
    return make(L, S, B=1, Ev=5, dlse=True), None, {"face": "jax"}


def _banded(L: int, S: int, left: int, right: int, offset: Any = 0, face: str = "torch") -> Case:
    B = 2 if np.ndim(offset) == 0 else len(offset)
    picture = band(L, S, left, right, offset)
    at = offset if isinstance(offset, int) else jnp.asarray(offset)
    return make(L, S, B=B, keep=picture, dlse=face == "jax"), sliding_window(left, right, at), {"face": face}


def _lower_right(L: int, S: int) -> Case:
    return make(L, S, keep=band(L, S, -1, 0, S - L)), causal_lower_right(L, S), {}


def _upper_left(L: int, S: int) -> Case:
    return make(L, S, keep=band(L, S, -1, 0), dlse=True), causal_upper_left(L, S), {"face": "jax"}


def _key_lengths(L: int, S: int, stops: Any, starts: Any = None, face: str = "torch", **sizes: Any) -> Case:
    problem = make(L, S, B=len(stops), keep=lengths(L, S, stops, starts), dlse=face == "jax", **sizes)
    return problem, KeyLengths(jnp.asarray(stops), None if starts is None else jnp.asarray(starts)), {"face": face}


def _capped(*of_bias: int) -> Case:
    """A bias is added to capped scores: its gradient is none of theirs."""
    return make(131, 260, Hq=4, softcap=0.7, bias=rng.standard_normal(of_bias), dlse=True), None, {"face": "jax"}


def _query_lengths() -> Case:
    stops = np.array([0, 3, 9])
    keep = (np.arange(9)[None, :] < stops[:, None])[:, None, :, None] & np.ones((1, 1, 1, 300), bool)
    return make(9, 300, B=3, keep=keep, dlse=True), QueryLengths(jnp.asarray(stops)), {"face": "jax"}


def _segments(query_ids: Any, key_ids: Any = None, also: str = "") -> Case:
    query_ids = np.asarray(query_ids)
    keys = query_ids if key_ids is None else np.asarray(key_ids)
    L, S = query_ids.shape[-1], keys.shape[-1]
    keep, mask = same_segment(query_ids, keys), SegmentIds(jnp.asarray(query_ids), None if key_ids is None else jnp.asarray(keys))
    if also == "causal":
        keep, mask = keep & band(L, S, -1, 0), mask & causal()
    return make(L, S, keep=keep), mask, {}


def _boundaries(sizes_q: Any, sizes_k: Any, left: int, right: int, used_k: Any = None, face: str = "jax", more: int = 0) -> Case:
    """Sequences packed by their boundaries, (B, N) sizes each, with `more` tokens behind the last one."""
    cu_q, cu_k = (np.concatenate([np.zeros((len(sizes), 1), int), np.cumsum(sizes, -1)], -1) for sizes in (sizes_q, sizes_k))
    L, S = cu_q.max() + more, cu_k.max() + more
    used = [None] * len(cu_q) if used_k is None else used_k
    keep = np.stack([packed(L, S, q, k, left, right, None, u) for q, k, u in zip(cu_q, cu_k, used, strict=True)])[:, None]
    mask = Packed(jnp.asarray(cu_q), jnp.asarray(cu_k), left, right, None, None if used_k is None else jnp.asarray(used_k))
    return make(L, S, B=len(cu_q), keep=keep, dlse=face == "jax"), mask, {"face": face}


def _packed(L: int, *sizes: int) -> np.ndarray:
    """Segment ids 0, 1, ... of these sizes, padding (-1) behind them."""
    ids = np.repeat(np.arange(len(sizes)), sizes)
    return np.concatenate([ids, -np.ones(L - len(ids), ids.dtype)])


def _everything(face: str) -> Case:
    """Causal & window & lengths & segments & dense bool & bias (& softcap & sinks in JAX's face), grouped heads, empty rows."""
    L, S, B, Hq = 140, 270, 2, 4
    ids_q, ids_k = rng.integers(0, 2, (B, L)), rng.integers(-1, 2, (B, S))
    stops, dense = np.array([201, 0]), rng.random((B, 1, 1, S)) < 0.8
    keep = band(L, S, -1, 0, 100) & band(L, S, 60, 2, 90) & lengths(L, S, stops) & same_segment(ids_q, ids_k) & dense
    mask = (
        causal(100)
        & sliding_window(60, 2, 90)
        & KeyLengths(jnp.asarray(stops))
        & SegmentIds(jnp.asarray(ids_q), jnp.asarray(ids_k))
    )
    extra = {"softcap": 2.0, "sinks": rng.standard_normal(Hq), "dlse": True} if face == "jax" else {"scale": np.array(0.7)}
    problem = make(L, S, B=B, Hq=Hq, Hk=2, keep=keep, bias=rng.standard_normal((Hq, L, 1)).astype(np.float32), **extra)
    return problem, mask & Dense(jnp.asarray(dense)), {"face": face}


def _dense(bool_shape: Any = None, bias_shape: Any = None, face: str = "torch", **options: Any) -> Case:
    L, S = 133, 260
    keep = None if bool_shape is None else rng.random(bool_shape) < 0.5
    if keep is not None and keep.shape[-2] == L:
        keep[..., [0, 77], :] = False  # rows that attend to nothing
    bias = None if bias_shape is None else rng.standard_normal(bias_shape)
    if bias is not None and bias.size > 4:
        bias[rng.random(bias_shape) < 0.2] = -np.inf
        if bias.shape[-2:] == (L, S):
            bias[..., 5, :] = -np.inf
    return make(L, S, B=3, Hq=4, keep=keep, bias=bias, dlse=face == "jax", **options), None, {"face": face}


CASES: dict[str, Callable[[], Case]] = {
    **{f"plain {L}x{S}": lambda L=L, S=S: _plain(L, S) for L, S in SIZES},
    "causal 7x9": lambda: _upper_left(7, 9),
    "causal 9x7": lambda: _upper_left(9, 7),
    "causal 257x129": lambda: _upper_left(257, 129),
    "causal 129x257": lambda: _upper_left(129, 257),
    "causal 513x513": lambda: _banded(513, 513, -1, 0),
    "lower right 5x12": lambda: _lower_right(5, 12),
    "lower right, first rows empty": lambda: _lower_right(12, 5),
    "lower right 129x300": lambda: _lower_right(129, 300),
    "lower right 300x129, a whole block of rows empty": lambda: _lower_right(300, 129),
    "offset per batch element, also negative and beyond S": lambda: _banded(130, 260, -1, 0, np.array([0, 150, -140, 400])),
    "window 3,2": lambda: _banded(140, 150, 3, 2),
    "window 0,0, L > S": lambda: _banded(300, 150, 0, 0, face="jax"),
    "window 200,-1": lambda: _banded(300, 300, 200, -1),
    "window -1,5, L < S": lambda: _banded(30, 300, -1, 5),
    "window 40,0 with a static offset": lambda: _banded(130, 400, 40, 0, 270),
    "window 17,4 with offsets": lambda: _banded(131, 270, 17, 4, np.array([-20, 139]), face="jax"),
    "key lengths 0, 1, 255, 256, 257, 300": lambda: _key_lengths(9, 300, [0, 1, 255, 256, 257, 300]),
    "key lengths beyond S and negative": lambda: _key_lengths(9, 40, [41, 1000, -3]),
    "key lengths, decode, grouped": lambda: _key_lengths(1, 513, [0, 1, 512], face="jax", Hq=4, Hk=2),
    "key lengths with left padding": lambda: _key_lengths(140, 300, [300, 200, 50], [130, 0, 60], face="jax"),
    "query lengths": _query_lengths,
    "segments packed": lambda: _segments(np.stack([_packed(300, 100, 30, 150), _packed(300, 1, 299)])),
    "segments packed & causal": lambda: _segments(np.stack([_packed(260, 128, 128), _packed(260, 3, 200)]), also="causal"),
    "segments out of order, L != S": lambda: _segments(rng.integers(-1, 4, (2, 140)), rng.integers(-1, 4, (2, 290))),
    "segments shared by the batch": lambda: _segments(_packed(150, 60, 60), _packed(290, 200, 90)),
    "segments that no key has": lambda: _segments(np.full((2, 9), 3), np.full((2, 300), 2)),
    "boundaries, causal": lambda: _boundaries([[3, 120, 0, 150], [257, 1, 7, 8]], [[3, 120, 0, 150], [257, 1, 7, 8]], -1, 0, more=5),
    "boundaries, window, L != S, some used": lambda: _boundaries(
        [[60, 9, 70], [1, 129, 9]], [[200, 5, 70], [64, 100, 111]], 90, 3, [[150, 5, 0], [64, 99, 100]], "torch"
    ),
    "boundaries, full": lambda: _boundaries([[128, 130]], [[256, 3]], -1, -1),
    "everything, torch's face": lambda: _everything("torch"),
    "everything, JAX's face": lambda: _everything("jax"),
    "bool (L, S), empty rows": lambda: _dense((133, 260)),
    "bool (B, 1, 1, S)": lambda: _dense((3, 1, 1, 260), face="jax"),
    "bool (B, H, L, 1)": lambda: _dense((3, 4, 133, 1)),
    "bool (1, S)": lambda: _dense((1, 260)),
    "bool (B, H, 1, 1)": lambda: _dense((3, 4, 1, 1)),
    "bool all False": lambda: (make(9, 300, keep=np.zeros((9, 300), bool), dlse=True), None, {"face": "jax"}),
    "bias (1, 1)": lambda: _dense(None, (1, 1)),
    "bias (1, S)": lambda: _dense(None, (1, 260), face="jax"),
    "bias (L, 1)": lambda: _dense(None, (133, 1)),
    "bias (L, S), -inf rows": lambda: _dense(None, (133, 260)),
    "bias (H, 1, S)": lambda: _dense(None, (4, 1, 260), face="jax"),
    "bias (1, H, L, S)": lambda: _dense(None, (1, 4, 133, 260)),
    "bias (B, 1, L, S)": lambda: _dense(None, (3, 1, 133, 260)),
    "bias (1, H, L, 1)": lambda: _dense(None, (1, 4, 133, 1)),
    "bias (B, H, L, S) and bool (B, 1, 1, S)": lambda: _dense((3, 1, 1, 260), (3, 4, 133, 260)),
    "grouped 6/2, Ev > E": lambda: (make(131, 260, Hq=6, Hk=2, Ev=16, dlse=True, keep=band(131, 260, -1, 0)), causal(), {"face": "jax"}),
    "one key/value head": lambda: (make(131, 260, Hq=4, Hk=1), None, {}),
    "grouped, bias per query head": lambda: _dense(None, (4, 133, 260), face="jax", Hk=2),
    "Hk 2, Hv 3": lambda: (make(9, 130, Hq=6, Hk=2, Hv=3), None, {}),
    "softcap": lambda: (make(131, 260, softcap=0.7, dlse=True), None, {"face": "jax"}),
    "softcap, bias (H, 1, S)": lambda: _capped(4, 1, 260),
    "softcap, bias (L, 1)": lambda: _capped(131, 1),
    "softcap, bias (L, S)": lambda: _capped(131, 260),
    "sinks": lambda: (make(131, 260, Hq=4, Hk=2, sinks=rng.standard_normal(4) * 3, dlse=True), None, {"face": "jax"}),
    "sinks with empty rows": lambda: (
        make(12, 5, sinks=np.array([1.0, -40.0]), keep=band(12, 5, -1, 0, -7), dlse=True), causal(-7), {"face": "jax"}
    ),
    "sink of -inf": lambda: (make(12, 5, sinks=np.array([1.0, -np.inf]), keep=band(12, 5, -1, 0, -7), dlse=True), causal(-7), {"face": "jax"}),
    "traced scale": lambda: (make(9, 300, scale=np.array(0.3)), None, {}),
    "traced negative scale": lambda: (make(9, 300, scale=np.array(-0.3), dlse=True, keep=band(9, 300, -1, 5)), causal(5), {"face": "jax"}),
    "static negative scale": lambda: (make(9, 300, scale=-1.3), None, {}),
    "large scores": lambda: (make(131, 260, scale=40.0, dlse=True), None, {"face": "jax"}),
    "bias that drifts, so that the maximum moves in every block": lambda: (
        make(5, 700, bias=np.linspace(-300, 300, 700)[None, :], dlse=True), None, {"face": "jax"}
    ),
}  # fmt: skip


def _seeded(build: Callable[[], Case], seed: int) -> Callable[[], Case]:
    """A case whose arrays do not depend on which tests ran before it in the same process."""

    def seeded() -> Case:
        global rng
        rng = np.random.default_rng([7, seed])
        return build()

    return seeded


CASES = {name: _seeded(build, seed) for seed, (name, build) in enumerate(CASES.items())}


def in_half(name: str, dtype: Any) -> Case:
    """The case in float16 or bfloat16, its bias in float32, which goes with either."""
    problem, mask, options = CASES[name]()
    problem = problem.rounded(dtype)
    return (problem if problem.bias is None else problem.but(bias=problem.bias.astype(np.float32))), mask, options
