"""Problems to solve, and how to run one on a backend: under jit, through either face, with every gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracle import Problem

from jax_sdpa import dot_product_attention, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.masks import Mask, as_mask


def forget_programs_when_many(most: int = 20_000) -> None:
    """Drop the compiled programs once they fill `most` memory maps: Linux lets a process have 65 530 (vm.max_map_count), then XLA dies."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
    except FileNotFoundError:  # not Linux: no such limit
        return
    if count > most:
        jax.clear_caches()


def make(
    L: int,
    S: int,
    *,
    B: int | tuple[int, ...] = 2,
    Hq: int = 2,
    Hk: int | None = None,
    Hv: int | None = None,
    E: int = 8,
    Ev: int | None = None,
    dlse: bool = False,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A problem of normal random arrays; `options` are fields of Problem."""
    rng = np.random.default_rng([seed, L, S])
    batch = (B,) if isinstance(B, int) else B
    Hk = Hq if Hk is None else Hk
    Hv = Hk if Hv is None else Hv
    Ev = E if Ev is None else Ev

    def draw(*shape):
        return rng.standard_normal((*batch, *shape))

    return Problem(draw(Hq, L, E), draw(Hk, S, E), draw(Hv, S, Ev), draw(Hq, L, Ev), dlse=draw(Hq, L) if dlse else None, **options)


@functools.cache
def _program(face: str, scale: float | None, softcap: float | None, static: tuple[tuple[str, Any], ...]) -> Any:
    """The jitted call with its vjp; `moving` and `constant` are dicts of operands by name."""

    def attend(given: dict[str, jax.Array], mask: Mask | None, options: dict[str, Any]) -> Any:
        q, k, v = given["query"], given["key"], given["value"]
        bias, sinks, options = (
            given.get("bias"),
            given.get("sinks"),
            {"scale": given.get("scale", scale), **dict(static), **options},
        )
        if face == "torch":
            both = mask if bias is None else bias if mask is None else mask & bias
            gqa = q.ndim > 2 and len({q.shape[-3], k.shape[-3], v.shape[-3]}) > 1
            return scaled_dot_product_attention(q, k, v, both, **{"enable_gqa": gqa, **options}), None
        q, k, v = (jnp.swapaxes(x, -2, -3) for x in (q, k, v))
        out, lse = dot_product_attention(q, k, v, bias, mask, sinks=sinks, softcap=softcap, return_residual=True, **options)
        return jnp.swapaxes(out, -2, -3), jnp.swapaxes(lse, -1, -2)

    @jax.jit
    def run(moving: Any, constant: Any, mask: Any, options: Any, dout: Any, dlse: Any) -> Any:
        (out, lse), pullback = jax.vjp(lambda moving: attend({**moving, **constant}, mask, options), moving)
        if lse is not None:
            dlse = jnp.zeros_like(lse) if dlse is None else dlse.astype(lse.dtype)
        return {"out": out, **({} if lse is None else {"lse": lse}), **pullback((dout.astype(out.dtype), dlse))[0]}

    return run


def on_jax(
    problem: Problem,
    backend: SDPBackend,
    *,
    face: str = "torch",
    mask: Mask | None = None,
    wrt: tuple[str, ...] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """{'out', 'lse' (JAX's face), and the cotangent of each float operand}, one compiled program.

    mask: a structured mask in place of the problem's `keep`, which is its picture for the oracle. Its arrays are traced.
    A problem's scale is traced and differentiated if it is a NumPy array. options: further arguments of the face.
    """
    operands = {name: getattr(problem, name) for name in ("query", "key", "value", "bias", "sinks")}
    traced_scale = isinstance(problem.scale, np.ndarray)
    operands = {**operands, "scale": problem.scale if traced_scale else None}
    operands = {name: jnp.asarray(x) for name, x in operands.items() if x is not None}
    wrt = tuple(operands) if wrt is None else wrt
    if mask is None and problem.keep is not None:
        mask = as_mask(jnp.asarray(problem.keep))
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    static = tuple((name, x) for name, x in options.items() if name not in arrays)
    with sdpa_kernel(backend):
        got = _program(face, None if traced_scale else problem.scale, problem.softcap, static)(
            {name: x for name, x in operands.items() if name in wrt},
            {name: x for name, x in operands.items() if name not in wrt},
            mask,
            arrays,
            jnp.asarray(problem.dout),
            None if problem.dlse is None else jnp.asarray(problem.dlse),
        )
    return {name: np.asarray(x) for name, x in got.items()}


def dropped(key: Any, B: int, Hq: int, L: int, S: int, p: float) -> np.ndarray:
    """What dropout multiplies the probabilities by, (B, Hq, L, S)."""
    from jax_sdpa import dropout

    if p == 1:
        return np.zeros((B, Hq, L, S))
    keep = dropout.keep_block(dropout.seeds(key, B, Hq), 0, L, 0, S, p)
    return np.asarray(keep, np.float64) / (1 - dropout.rounded(p))


def poisoned(problem: Problem, stretches: Sequence[tuple[int, int]] | None) -> Problem:
    """stretches: for each batch entry the keys that somebody sees; the others, and their values, become NaN. None: as it is."""
    if stretches is None:
        return problem
    problem = problem.but(key=problem.key.copy(), value=problem.value.copy())
    for b, (start, stop) in enumerate(stretches):
        hidden = np.r_[:start, stop : problem.key.shape[2]]
        problem.key[b, :, hidden], problem.value[b, :, hidden] = np.nan, np.nan
    return problem


def quantised(
    problem: Problem, dtype: Any, scales: str, *, rounded_to: Any = None, stretches: Sequence[tuple[int, int]] | None = None
) -> tuple[Problem, dict[str, np.ndarray]]:
    """(the problem whose keys and values are those that 8 bits stand for, {'key', 'value', 'key_scale', 'value_scale'}).

    dtype: int8 or float8_e4m3fn; scales: for each 'key', (B, H, S), each 'head', (1, H, 1), or 'one', (1, 1, 1). rounded_to: of what
    they stand for; None: exactly. stretches: as `poisoned`, of the 8-bit arrays and the scales.
    """
    axes, most = {"key": (3,), "head": (0, 2, 3), "one": (0, 1, 2, 3)}[scales], 127 if dtype == jnp.int8 else 448
    stand_for, eight = {}, {}
    for name in ("key", "value"):
        wide = np.asarray(getattr(problem, name), np.float64)
        scale = (np.abs(wide).max(axes, keepdims=True) / most).astype(np.float32)
        x = (np.rint(wide / scale) if dtype == jnp.int8 else wide / scale).astype(dtype)
        exact = x.astype(np.float64) * scale
        stand_for[name] = exact if rounded_to is None else exact.astype(np.float32).astype(rounded_to)
        for b, (start, stop) in enumerate(stretches or ()):
            hidden = np.r_[:start, stop : x.shape[2]]
            x[b, :, hidden] = 99 if dtype == jnp.int8 else np.nan
            if scales == "key":
                scale[b, :, hidden] = np.nan
        eight |= {name: x, name + "_scale": scale[..., 0]}
    return problem.but(**stand_for), eight


def assert_same_bits(run: Any, args: Any, times: int) -> Any:
    """What a run gives, and so many more give the same bits; the comparison stays on the device."""
    run = jax.jit(run)

    @jax.jit
    def differ(one: Any, other: Any) -> Any:
        def bits(x: Any) -> Any:
            return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (bits(x) != bits(y)).sum(), one, other)))

    first = run(*args)
    assert sum(int(differ(run(*args), first)) for _ in range(times)) == 0
    return first
