"""The answer, its gradients, and how wrong a backend may be.

`solve` is attention written out in NumPy, to be read beside the contract; `test_oracle.py` holds it to torch float64 MATH.
Evaluated in long double it is the exact answer; evaluated in float32 (float64 for float64 calls), with one rounding of each
result, it is an honest implementation. `assert_as_good` allows a few times what the honest one gets wrong, nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

Array = np.ndarray
EXACT = np.longdouble


@dataclasses.dataclass(frozen=True, repr=False)
class Problem:
    """One call in torch's layout, as NumPy arrays, with the cotangents that its gradients are taken of.

    query (..., Hq, L, E), key (..., Hk, S, E), value (..., Hv, S, Ev); bias and keep (True = takes part) broadcast to
    (..., Hq, L, S); survivors multiplies the probabilities (dropout); sinks (Hq,); dout as the output, dlse (..., Hq, L).
    """

    query: Array
    key: Array
    value: Array
    dout: Array
    dlse: Array | None = None
    bias: Array | None = None
    keep: Array | None = None
    survivors: Array | None = None
    sinks: Array | None = None
    scale: float | None = None
    softcap: float | None = None

    def __repr__(self) -> str:  # a failing property test prints it: shapes tell more than pages of numbers
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return "Problem(" + ", ".join(f"{name}={getattr(x, 'shape', x)}" for name, x in fields.items() if x is not None) + ")"

    def but(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, **changes)

    def rounded(self, dtype: Any) -> Problem:
        """The same with query, key, value and dout as `dtype` holds them."""
        return self.but(**{name: getattr(self, name).astype(dtype) for name in ("query", "key", "value", "dout")})


def compute_dtype(dtype: Any) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of broadcasting to x's shape."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1), keepdims=True)


def _ungroup(x: Array, heads: int) -> Array:
    """The transpose of repeating each head."""
    return x.reshape(*x.shape[:-3], heads, x.shape[-3] // heads, *x.shape[-2:]).sum(-3)


def solve(problem: Problem, dtype: Any = EXACT, rounded_to: Any = None) -> dict[str, Array]:
    """{'out', 'lse', and the cotangent of each operand that is there}, computed in `dtype`.

    The cotangents that are sums over the call come with 'size of' them, the root of the sum of squares of what is summed; the
    terms are differences, and it is their parts that count, which round before they cancel. A sink's has "out's part of" it, the
    same for what is multiplied by out alone.
    rounded_to: go backward from out rounded to this dtype and from lse alone, as every backend does that keeps (out, lse).
    """

    def cast(x):
        return None if x is None else np.asarray(x).astype(dtype)

    q, k, v, dout = (cast(x) for x in (problem.query, problem.key, problem.value, problem.dout))
    bias, sinks, survivors = cast(problem.bias), cast(problem.sinks), cast(problem.survivors)
    scale = dtype(1 / np.sqrt(EXACT(q.shape[-1])) if problem.scale is None else problem.scale)
    if q.ndim == 2:
        raise ValueError("the oracle wants a heads dim")
    Hk, Hv = k.shape[-3], v.shape[-3]
    K = np.repeat(k, q.shape[-3] // Hk if Hk > 1 else 1, axis=-3)
    V = np.repeat(v, q.shape[-3] // Hv if Hv > 1 else 1, axis=-3)

    products = q @ np.swapaxes(K, -1, -2)
    root = np.sqrt(np.abs(scale))
    s = (q * (np.sign(scale) * root)) @ np.swapaxes(K * root, -1, -2)  # as torch's MATH splits it
    slope = np.ones((), dtype)
    if problem.softcap is not None:
        t = np.tanh(s / dtype(problem.softcap))
        s, slope = dtype(problem.softcap) * t, 1 - t * t
    if bias is not None:
        s = s + bias
    if problem.keep is not None:
        s = np.where(problem.keep, s, -np.inf).astype(dtype)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    top = np.where(np.isneginf(top), 0, top).astype(dtype)
    e = np.exp(s - top)
    total = e.sum(-1, keepdims=True)
    if sinks is not None:
        at_sink = np.exp(sinks[:, None, None] - top)
        total = total + at_sink
    empty = total == 0
    total = np.where(empty, 1, total).astype(dtype)
    p = e / total
    lse = np.where(empty, -np.inf, top + np.log(total))[..., 0].astype(dtype)
    weights = p if survivors is None else p * survivors
    out = weights @ V

    kept_out = out
    if rounded_to is not None:
        kept_out = out.astype(rounded_to).astype(dtype)
        p = np.exp(s - np.where(empty[..., 0], 0, lse)[..., None])
    dweights = dout @ np.swapaxes(V, -1, -2)
    dp = dweights if survivors is None else dweights * survivors
    dlse = dtype(0) if problem.dlse is None else cast(problem.dlse)[..., None]
    row = (dout * kept_out).sum(-1, keepdims=True) - dlse
    out_size = np.sqrt(((dout * kept_out) ** 2).sum(-1, keepdims=True))
    row_size = np.sqrt(out_size**2 + dlse**2)
    ds, ds_size = p * (dp - row), p * np.sqrt(dp**2 + row_size**2)
    answer = {"out": out, "lse": lse, "largest score": np.abs(s[np.isfinite(s)]).max(initial=0)}
    summed = {}
    if bias is not None:
        summed["bias"] = ds, ds_size, lambda x: _sum_to(x, bias.shape)
    if sinks is not None:
        weight = (at_sink / total)[..., 0]
        summed["sinks"] = -weight * row[..., 0], weight * row_size[..., 0], lambda x: _sum_to(x.sum(-1), sinks.shape)
    ds = ds * slope
    summed["scale"] = ds * products, ds_size * slope * products, np.sum
    for name, (terms, sizes, add_up) in summed.items():
        answer[name] = np.asarray(add_up(terms))
        answer["size of " + name] = np.sqrt(np.max(add_up(sizes * sizes)))
    if sinks is not None:
        answer["out's part of sinks"] = np.sqrt(np.max(_sum_to(((weight * out_size[..., 0]) ** 2).sum(-1), sinks.shape)))
    answer["query"] = _sum_to(scale * (ds @ K), q.shape)
    dK = scale * (np.swapaxes(ds, -1, -2) @ q)
    dV = np.swapaxes(weights, -1, -2) @ dout
    answer["key"] = _sum_to(dK if Hk == 1 else _ungroup(dK, Hk), k.shape)
    answer["value"] = _sum_to(dV if Hv == 1 else _ungroup(dV, Hv), v.shape)
    ds_squares = (scale * ds_size * slope) ** 2  # one key: dp - row is 0, but for the rounding of both
    answer["size of query"] = np.sqrt(np.max(_sum_to(ds_squares @ K**2, q.shape), initial=0))
    squares_k = np.swapaxes(ds_squares, -1, -2) @ q**2
    answer["size of key"] = np.sqrt(np.max(_sum_to(squares_k if Hk == 1 else _ungroup(squares_k, Hk), k.shape), initial=0))
    squares = np.swapaxes(weights**2, -1, -2) @ dout**2  # one key, 19 queries, a sum of 0.2: rounded as its terms of 1 are
    answer["size of value"] = np.sqrt(np.max(_sum_to(squares if Hv == 1 else _ungroup(squares, Hv), v.shape), initial=0))
    return answer


def assert_as_good(got: Any, exact: Any, honest: Any, what: str = "", size: Any = 0, score: Any = 0, typical: Any = 0) -> None:
    """The tolerance rule, the only one: at most 3 times the error of an honest implementation of the same precision, or 3 times
    the `typical` one where it is known: the sum of many roundings is small by luck now and then.

    The floor, for results that the honest one happens to hit: one rounding to got's dtype, and 8 ulp of the dtype that half
    precision is computed in, or as many ulp as the largest score is large (exp makes that of its rounding). Errors are measured
    against the largest entry, or `size` where a result is a sum of larger terms; NaN and infinity must be where they belong.
    """
    dtype = got.dtype
    honest = np.asarray(honest).astype(dtype).astype(EXACT)
    got, exact = np.asarray(got).astype(EXACT), np.asarray(exact, EXACT)
    assert got.shape == exact.shape, f"{what}: shape {got.shape} instead of {exact.shape}"
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(np.where(finite, 0, got), np.where(finite, 0, exact), err_msg=f"{what}: NaN and infinities")
    if not finite.any():
        return
    got, exact, honest = got[finite], exact[finite], honest[finite]
    largest = np.abs(exact).max()
    ulps = max(8, score) * float(np.finfo(compute_dtype(dtype)).eps)
    floor = largest * float(jnp.finfo(dtype).eps) / 2 + ulps * max(largest, size)
    error, allowed = np.abs(got - exact).max(), 3 * max(np.abs(honest - exact).max(), typical) + floor
    assert error <= allowed, f"{what}: error {error:.3g} of {largest:.3g}, allowed {allowed:.3g}"  # NaN fails too


def check(problem: Problem, got: dict[str, Any], *, names: tuple[str, ...] | None = None) -> None:
    """Hold every result in `got` to the oracle; `problem` must hold the rounded inputs."""
    dtype = got["out"].dtype
    exact, honest = solve(problem), solve(problem, compute_dtype(dtype), rounded_to=dtype)
    for name in names or got:
        # a rounding is evenly spread over an ulp: its standard deviation is ulp / sqrt(12)
        typical = exact.get("out's part of " + name, 0) * float(jnp.finfo(dtype).eps) / np.sqrt(12)
        size = exact.get("size of " + name, 0)
        assert_as_good(got[name], exact[name], honest[name], name, size, exact["largest score"], typical)


# --- masks as NumPy pictures, written without looking at jax_sdpa.masks


def band(L: int, S: int, left: int = -1, right: int = -1, offset: Any = 0) -> Array:
    """(L, S), or (B, 1, L, S) for an offset per batch element: keys from `left` before to `right` behind q + offset."""
    offset = np.asarray(offset)
    if offset.ndim:
        return np.stack([band(L, S, left, right, o) for o in offset])[:, None]
    distance = np.arange(S)[None, :] - (np.arange(L)[:, None] + int(offset))
    return ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))


def lengths(L: int, S: int, stops: Any, starts: Any = None) -> Array:
    """(B, 1, L, S): the keys of each batch element from its start up to its stop."""
    stops = np.asarray(stops)
    starts = np.zeros_like(stops) if starts is None else np.asarray(starts)
    keep = np.zeros((len(stops), 1, L, S), bool)
    for b, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        keep[b, :, :, start : max(start, stop)] = True
    return keep


def same_segment(query_ids: Any, key_ids: Any) -> Array:
    """(B, 1, L, S): equal ids that are not negative."""
    query_ids, key_ids = np.atleast_2d(query_ids), np.atleast_2d(key_ids)
    return ((query_ids[:, :, None] == key_ids[:, None, :]) & (query_ids[:, :, None] >= 0))[:, None]


def packed(L: int, S: int, cu_q: Any, cu_k: Any, left: int = -1, right: int = -1, used_q: Any = None, used_k: Any = None) -> Array:
    """(L, S): each sequence's own square, a band of it that is aligned to its bottom right; of it the used queries and keys."""
    keep = np.zeros((L, S), bool)
    for n in range(len(cu_q) - 1):
        queries = cu_q[n + 1] - cu_q[n] if used_q is None else used_q[n]
        keys = cu_k[n + 1] - cu_k[n] if used_k is None else used_k[n]
        square = band(queries, keys, left, right, keys - queries)
        keep[cu_q[n] : cu_q[n] + queries, cu_k[n] : cu_k[n] + keys] = square
    return keep


# --- torch


def on_torch(
    problem: Problem, dtype: str, *, is_causal: bool = False, mask: Any = None, enable_gqa: bool = False
) -> dict[str, Array]:
    """{'out' and the gradients} of torch's MATH in `dtype` ('float64', 'bfloat16', ...), as float64 NumPy arrays.

    mask: what goes to attn_mask, a bool or float NumPy array; default: the problem's bias or keep.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if problem.softcap is not None or problem.sinks is not None or problem.survivors is not None or problem.dlse is not None:
        raise ValueError("torch's function has none of these")
    wanted = getattr(torch, dtype)

    def tensor(x, dtype):
        return torch.tensor(np.asarray(x).astype(np.float64), dtype=dtype, requires_grad=True)

    q, k, v = (tensor(x, wanted) for x in (problem.query, problem.key, problem.value))
    mask = mask if mask is not None else problem.bias if problem.bias is not None else problem.keep
    is_float = mask is not None and np.asarray(mask).dtype != bool
    if is_float:
        mask = tensor(mask, torch.float32 if np.asarray(mask).dtype == np.float32 else wanted)
    elif mask is not None:
        mask = torch.tensor(np.asarray(mask))
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=problem.scale, enable_gqa=enable_gqa
        )
    out.backward(torch.tensor(np.asarray(problem.dout).astype(np.float64), dtype=wanted))
    answer = {"out": out, "query": q.grad, "key": k.grad, "value": v.grad}
    if is_float:
        answer["bias"] = mask.grad
    return {name: x.detach().double().numpy() for name, x in answer.items()}
