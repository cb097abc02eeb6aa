"""The launch of the backward: from the arrays of a call and of its results to dq, dk and dv. Padding is `flash_attention`'s."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import backward_tuning, dense
from pallas_kernels.contracts import BackwardConfig, ForwardShape, WalkConfig, cuts_few, has_ids
from pallas_kernels.flash_attention import cut_once, facts_of, hidden_by, longer, slope, up

WANTS = ("query", "key", "value")


def row_deltas(out: jax.Array, dout: jax.Array, dlse: jax.Array | None, heads_axis: int) -> jax.Array:
    """delta = sum(out * dout) - dlse of every row, (B, Hq, L) float32 (float64): lse's cotangent joins with the opposite sign."""
    dtype = jnp.promote_types(out.dtype, jnp.float32)
    delta = jnp.sum(out.astype(dtype) * dout.astype(dtype), -1)
    delta = delta if heads_axis == 1 else jnp.swapaxes(delta, 1, 2)
    return delta if dlse is None else delta - dlse


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array, lse: jax.Array, delta: jax.Array, *, layout: str,
    scale: Any, softcap: float | None = None, mask: Any = None, bias: Any = None, row_sum: Any = None, keep: Any = None,
    seeds: Any = None, dropout_p: float = 0.0, generator: Any = None, empty: Any = None, wants: tuple[str, ...] = WANTS,
    deterministic: bool = True, config: BackwardConfig | None = None, interpret: Any = None,
) -> dict[str, jax.Array]:  # fmt: skip
    """{'query': dq, 'key': dk, 'value': dv, 'bias': dbias} by the Hopper kernels, those of `wants`; arguments as in
    `flash_attention.forward`.

    dout: as out, in query's dtype. lse, delta: (B, Hq, L) float32, of the forward and of `row_deltas`. With a bias p is
    exp(s - lse) / row_sum: lse may be the row's maximum, because that of a row of -1e9 has lost the logarithm of its sum.
    deterministic: the same bits each time; else, where that is much faster, key tiles add to dq in any order (`chosen`).

    Rows that attend to nothing (lse = -inf) give and get zeros, and so do keys that `mask` hides from every query, which may hold
    anything. empty: (B, Hq, L) bool, rows that attend to nothing whose query and dout may, too; None: all are numbers.
    """
    from pallas_kernels import hopper_hidden, hopper_operands  # jax 0.11.2 and newer only
    from pallas_kernels.hopper_backward_dkv import dkv
    from pallas_kernels.hopper_backward_dq import dq
    from pallas_kernels.hopper_backward_roles import dkv_in_roles

    heads_axis = 1 if layout == "BHLE" else 2
    length_axis = 3 - heads_axis
    B, Hq, L, E = query.shape[0], query.shape[heads_axis], query.shape[length_axis], query.shape[3]
    H, S, Ev = key.shape[heads_axis], key.shape[length_axis], value.shape[3]
    if "bias" in wants and dense.kind(bias) == "tile" and bias.shape[0] != B:
        given = {
            "query": query, "key": key, "value": value, "dout": dout, "lse": lse, "delta": delta, "layout": layout, "scale": scale,
            "softcap": softcap, "mask": mask, "row_sum": row_sum, "keep": keep, "seeds": seeds, "dropout_p": dropout_p,
            "generator": generator, "empty": empty, "deterministic": deterministic, "config": config, "interpret": interpret,
        }  # fmt: skip
        return _by_batch_entry(B, bias, wants, given)
    drops = dropout_p > 0 and generator.rounded(dropout_p) < 1
    if dropout_p > 0 and not drops:  # p = 1: every weight is dropped, lse is that of the softmax before
        dout = jnp.zeros_like(dout)
    if config is None:
        config = chosen(
            heads=B * Hq, group=Hq // H, query_len=L, key_len=S, head_dim=E, value_head_dim=Ev, mask=mask, bias=bias,
            keep=keep, drops=drops, capped=softcap is not None, deterministic=deterministic,
            readers=dense.readers(bias, B, Hq), summed="bias" in wants and dense.is_keyed(bias),
        )  # fmt: skip
    given_mask = mask
    if keep is not None:
        mask, keep = hidden_by(mask, keep, L, S)
    bias_kind = None if bias is None else dense.kind(bias)
    static_scale = scale if isinstance(scale, float) else None
    shape = ForwardShape(
        B, Hq, H, L, S, up(E, 16), up(Ev, 16), query.dtype, layout, static_scale, softcap, dropout_p if drops else 0.0
    )
    given = [
        longer(query, {length_axis: up(L, 8), 3: up(E, 16)}), longer(key, {length_axis: up(S, 8), 3: up(E, 16)}),
        longer(value, {length_axis: up(S, 8), 3: up(Ev, 16)}), longer(dout, {length_axis: up(L, 8), 3: up(Ev, 16)}),
    ]  # fmt: skip
    kernels = _kernels(config, wants, shape, bias_kind)
    length = max((up(L, own.rows if name == "query" else own.block_k) for names, own in kernels for name in names), default=0)
    survivors = hopper_operands.survivor_scale(shape, generator)
    given.append(
        hopper_operands.row_numbers(lse, delta / survivors if drops else delta, length, row_sum if bias is not None else None)
    )
    more = {
        "keep": keep, "bias": bias, "seeds": seeds, "scale": None if static_scale is not None else scale, "generator": generator,
        "seen_keys": hopper_hidden.seen_keys(given_mask, mask, L, S), "seen_queries": None if empty is None else ~empty,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for names, own in kernels:
        fused = names == WANTS
        operands = hopper_operands.Operands.of(shape, own, mask, **more, transposed=names != ("query",), interpret=interpret)
        sums = "bias" in wants and bias_kind in (("row", "scalar") if names == ("query",) else ("column",))
        if names == ("query",):
            stores = "bias" in wants and bias_kind == "tile"
            run = dq(shape, own, operands, adds_up=sums, stores=stores, interpret=interpret)
            arguments = [*given, *operands.arrays]
            if stores:
                results, tiles = _written(operands.bias_like((B, Hq)), run, arguments, interpret)
                found["bias"] = _of_heads(bias, tiles)
            else:
                results = run(*arguments)
        else:
            words = [hopper_operands.query_words(generator, operands.seeds, length)] if drops else []
            arguments = [*given, *words, *operands.arrays]
            outs = {"key": "dk", "value": "dv"}
            keys = tuple(name for name in names if name != "query")
            if own.roles:
                run = dkv_in_roles(shape, own, operands, adds_up=sums, interpret=interpret)
            else:
                run = dkv(
                    shape, own, operands, wants=tuple(outs[name] for name in keys), fused=fused, adds_up=sums and "key" in keys,
                    interpret=interpret,
                )  # fmt: skip
            if fused:
                like = [(*x.shape[:heads_axis], H * own.split, *x.shape[heads_axis + 1 :]) for x in given[1:3]]
                summed, factor = (B, Hq, up(L, own.block_k), up(E, 16)), scale_of_sums(scale) * survivors
                results, found["query"] = added_into(summed, run, arguments, like, factor, heads_axis, interpret)
            else:
                results = run(*arguments)
            if own.split > 1:
                results = [*(_of_group(x, own.split, heads_axis) for x in results[: len(keys)]), *results[len(keys) :]]
            names, sums = keys, sums and "key" in keys
        if sums:
            *results, per_row = results
            found["bias"] = summed_like(bias, per_row[:, :, : S if bias_kind == "column" else L] * survivors)
        found |= dict(zip(names, results, strict=True))
    like = {"query": query, "key": key, "value": value, "bias": bias}
    return {name: jax.lax.slice(found[name], (0, 0, 0, 0), like[name].shape) for name in wants}


def chosen(
    *, query_len: int, key_len: int, mask: Any, bias: Any, keep: Any, deterministic: bool, **facts: Any
) -> BackwardConfig:  # fmt: skip
    """The tuned configuration of a call; facts: more of what `backward_tuning.backward_config` asks for. With `fused` (only where
    not deterministic), and where all of query, key and value are wanted, dq's last bits vary from run to run.

    Not fused: a bias, and masks with an id for each position, whose rows may see few keys, which nobody knows here.
    """
    sloped, seen = slope(mask, query_len, key_len)
    deterministic = deterministic or bias is not None or has_ids(mask)
    bare = keep is None and bias is None and not jax.tree.leaves(mask)
    once = bare and query_len % 64 == 0 and cut_once(mask, query_len, key_len)
    return backward_tuning.backward_config(
        query_len=query_len, key_len=key_len, sloped=sloped, cut_once=once, seen=seen, **facts_of(mask, keep),
        prefix=cuts_few(mask, keep),
        biased=bias is not None, bias_bytes=dense.tile_bytes(bias), deterministic=deterministic, **facts,
    )  # fmt: skip


def _of_group(parts: jax.Array, split: int, axis: int) -> jax.Array:
    """The sum of `split` neighbours along the heads, in float32."""
    shape = (*parts.shape[:axis], parts.shape[axis] // split, split, *parts.shape[axis + 1 :])
    return parts.astype(jnp.float32).reshape(shape).sum(axis + 1).astype(parts.dtype)


def _by_batch_entry(batch: int, bias: jax.Array, wants: tuple[str, ...], given: dict[str, Any]) -> dict[str, jax.Array]:
    """`backward` with a bias (1, Hq|1, L, S) that all batch entries share: its gradient is their sum, and a kernel makes that of
    one entry. So dq is made for one after the other, which costs memory for the scores of one; dk and dv for all at once.

    given: the other arguments; arrays, in trees or not, have a leading dim of 1 or the batch.
    """
    keys = tuple(name for name in wants if name in ("key", "value"))
    found = backward(**given, bias=bias, wants=keys) if keys else {}

    def entry(total: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        def own(x: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(x, b, 1, 0) if isinstance(x, jax.Array) and x.shape[0] == batch else x

        one = backward(**jax.tree.map(own, given), bias=bias, wants=("query", "bias"))
        return total + one["bias"].astype(jnp.float32), one["query"]

    total = jnp.zeros(bias.shape, jnp.float32)
    total, dq = jax.lax.scan(entry, total, jnp.arange(batch, dtype=jnp.int32))
    found |= {"query": dq[:, 0], "bias": total.astype(bias.dtype)}
    return {name: found[name] for name in wants}


def _of_heads(bias: Any, tiles: jax.Array) -> jax.Array:
    """The gradient of a bias as large as the scores, from that of each head: their sum, in float32, where heads share it."""
    return tiles if bias.shape[1] == tiles.shape[1] else tiles.astype(jnp.float32).sum(1, keepdims=True).astype(bias.dtype)


def summed_like(bias: Any, per_row: jax.Array) -> jax.Array:
    """The gradient of a bias of queries or of keys: (B, Hq, rows), a number for each, summed over what the bias shares."""
    if dense.kind(bias) == "scalar":
        per_row = per_row.sum(2, keepdims=True)
    shared = tuple(axis for axis, size in enumerate(bias.shape[:2]) if size == 1)
    return per_row.sum(shared, keepdims=True).reshape(bias.shape).astype(bias.dtype)


def _written(like: Any, run: Any, given: list[Any], interpret: Any) -> tuple[list[jax.Array], jax.Array]:
    """(run's results, what it writes tile by tile into zeros like the padded bias of each head)."""
    if interpret is not None:
        *results, tiles = run(*given)
        return results, unwritten_as_zero(tiles)
    return with_reference(run, given, given[:1], jnp.zeros(like.shape, like.dtype))


def scale_of_sums(scale: Any) -> Any:
    """The scale, to stand beside (B, Hq, L, E)."""
    return scale if isinstance(scale, float) else scale.astype(jnp.float32).reshape(-1, 1, 1, 1)


def added_into(
    shape: tuple[int, ...], run: Any, given: list[Any], like: list[tuple[int, ...]], factor: Any, heads_axis: int, interpret: Any
) -> tuple[list[jax.Array], jax.Array]:
    """(run's results, of the shapes `like`; factor * the float32 sums of `shape` that it adds up in memory, in the dtype of what it
    is given, heads where heads_axis says)."""
    from pallas_kernels import hopper_adding

    *lead, length, dim = shape
    if interpret is not None:
        *results, parts = run(*given)
        sums = (jnp.swapaxes(unwritten_as_zero(parts).sum(0), -3, -2).reshape(shape) * factor).astype(given[0].dtype)
        return results, sums if heads_axis == 1 else jnp.swapaxes(sums, 1, 2)
    start = jnp.zeros((*lead, length // hopper_adding.SIDE, dim // hopper_adding.SIDE, *hopper_adding.PIECE), jnp.float32)
    results, sums = with_reference(run, given, [jax.ShapeDtypeStruct(of, given[0].dtype) for of in like], start)
    return results, hopper_adding.in_order(sums, factor, given[0].dtype, heads_axis)


def unwritten_as_zero(x: jax.Array) -> jax.Array:
    """Zeros in place of the tiles (64, 64) that are NaN throughout, as the interpreter's memory is before it is written."""
    *lead, rows, columns = x.shape
    wide = jnp.pad(x, ((0, 0),) * len(lead) + ((0, -rows % 64), (0, -columns % 64)), constant_values=jnp.nan)
    tiles = wide.reshape(*lead, wide.shape[-2] // 64, 64, wide.shape[-1] // 64, 64)
    tiles = jnp.where(jnp.isnan(tiles).all((-3, -1), keepdims=True), 0, tiles)
    return tiles.reshape(wide.shape)[..., :rows, :columns]


def with_reference(run: Any, given: list[Any], like: list[Any], start: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """(run's results, shaped like the arrays `like`; what it makes of a reference that begins as `start`).

    By `run_state`, which leaves no effect behind: `jax.new_ref` is refused where a call is partitioned over several devices.
    """

    def stage(refs: Any) -> None:
        target, *results = refs
        for ref, result in zip(results, run(*given, target), strict=True):
            ref[...] = result

    end, *results = pl.run_state(stage)((start, *(jnp.zeros(x.shape, x.dtype) for x in like)))
    return results, end


def _kernels(
    config: BackwardConfig, wants: tuple[str, ...], shape: ForwardShape, bias_kind: str | None
) -> list[tuple[tuple[str, ...], WalkConfig]]:
    """What each kernel to be run makes, and how; a bias's gradient comes beside dq, that of a bias of keys beside dk."""
    if set(wants) == set(WANTS) and config.fused is not None and config.can_fuse(shape.head_dim) and bias_kind is None:
        return [(WANTS, config.fused)]
    needed = set(wants)
    if "bias" in wants:
        needed.add("key" if bias_kind == "column" else "query")
    kernels: list[tuple[tuple[str, ...], WalkConfig]] = [(("query",), config.dq)] if "query" in needed else []
    keys = tuple(name for name in ("key", "value") if name in needed)
    together = config.keys_together(shape.head_dim, shape.value_head_dim)
    if len(keys) == 2 and together is not None:
        return [*kernels, (keys, together)]
    return [*kernels, *(((name,), config.dk if name == "key" else config.dv) for name in keys)]
