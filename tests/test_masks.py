"""Masks as values: the pictures, `&`, the ranges that backends skip blocks by, batch dims, pytrees, and every error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import band, lengths, packed, same_segment

from jax_sdpa import dot_product_attention, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention import bias as bias_module
from jax_sdpa.attention.bias import (
    And,
    Band,
    CausalBias,
    CausalVariant,
    Dense,
    KeyLengths,
    Packed,
    QueryLengths,
    SegmentIds,
    causal,
    causal_lower_right,
    causal_upper_left,
    sliding_window,
)
from jax_sdpa.masks import EVERYTHING, KeyRanges, as_mask, conjunction
from jax_sdpa.masks import packed as packed_module


def picture(text):
    return np.array([[int(mark) for mark in row.split()] for row in text.strip().splitlines()], bool)


PICTURES = {
    "causal, L < S": (causal(), "1 0 0 0 0\n1 1 0 0 0\n1 1 1 0 0"),
    "causal, L > S": (causal(), "1 0\n1 1\n1 1\n1 1"),
    "causal with an offset": (causal(2), "1 1 1 0 0\n1 1 1 1 0\n1 1 1 1 1"),
    "causal with a negative offset": (causal(-1), "0 0 0\n1 0 0\n1 1 0"),
    "upper left": (causal_upper_left(2, 4), "1 0 0 0\n1 1 0 0"),
    "lower right, L < S": (causal_lower_right(2, 4), "1 1 1 0\n1 1 1 1"),
    "lower right, L > S": (causal_lower_right(4, 2), "0 0\n0 0\n1 0\n1 1"),
    "window (2, 1)": (sliding_window(2, 1), "1 1 0 0 0\n1 1 1 0 0\n1 1 1 1 0\n0 1 1 1 1\n0 0 1 1 1"),
    "window (0, 0)": (sliding_window(0, 0), "1 0 0\n0 1 0\n0 0 1"),
    "window (1, -1)": (sliding_window(1, -1), "1 1 1 1\n1 1 1 1\n0 1 1 1\n0 0 1 1"),
    "window (-1, 1)": (sliding_window(-1, 1), "1 1 0 0\n1 1 1 0"),
    "window (-1, -1)": (sliding_window(-1, -1), "1 1 1\n1 1 1"),
    "window (1, 0) at the end of a cache": (sliding_window(1, 0, 3), "0 0 1 1 0\n0 0 0 1 1"),
    "segments": (SegmentIds(jnp.array([0, 0, 1, -1])), "1 1 0 0\n1 1 0 0\n0 0 1 0\n0 0 0 0"),
    "segments of queries and keys": (SegmentIds(jnp.array([5, 7]), jnp.array([7, 5, 5, -1])), "0 1 1 0\n1 0 0 0"),
    "one length for all": (KeyLengths(2), "1 1 0 0\n1 1 0 0"),
    "length and start": (KeyLengths(3, 1), "0 1 1 0\n0 1 1 0"),
    "query length": (QueryLengths(1), "1 1 1\n0 0 0"),
    "query length and start": (QueryLengths(2, 1), "0 0 0\n1 1 1\n0 0 0"),
    "ranges": (KeyRanges(jnp.array([0, 1, 3]), jnp.array([2, 3, 3])), "1 1 0 0\n0 1 1 0\n0 0 0 0"),
    "packed": (Packed(jnp.array([0, 2, 2, 3])), "1 1 0 0\n1 1 0 0\n0 0 1 0\n0 0 0 0"),
    "packed, causal, from token 1 on": (Packed(jnp.array([1, 3, 4]), right=0), "0 0 0 0\n0 1 0 0\n0 1 1 0\n0 0 0 1"),
    "packed, more keys than queries, causal": (
        Packed(jnp.array([0, 1, 3]), jnp.array([0, 2, 5]), right=0),
        "1 1 0 0 0\n0 0 1 1 0\n0 0 1 1 1",
    ),
    "packed, more queries than keys, window": (
        Packed(jnp.array([0, 3, 4]), jnp.array([0, 2, 3]), left=0, right=0),
        "0 0 0\n1 0 0\n0 1 0\n0 0 1",
    ),
    "packed, of which some are used": (
        Packed(jnp.array([0, 2, 3]), jnp.array([0, 3, 5]), right=0, used_k=jnp.array([2, 1])),
        "1 0 0 0 0\n1 1 0 0 0\n0 0 0 1 0",
    ),
    "packed & window": (Packed(jnp.array([0, 2, 3])) & sliding_window(0, -1), "1 1 0\n0 1 0\n0 0 1"),
    "dense": (Dense(jnp.array([[True, False, True]])), "1 0 1"),
    "causal & window": (causal() & sliding_window(1, -1), "1 0 0 0\n1 1 0 0\n0 1 1 0\n0 0 1 1"),
    "causal & segments & lengths": (
        causal() & SegmentIds(jnp.array([0, 0, 1, 1])) & KeyLengths(3),
        "1 0 0 0\n1 1 0 0\n0 0 1 0\n0 0 1 0",
    ),
    "dense & causal": (jnp.array([[True, True, False]]) & causal(), "1 0 0\n1 1 0\n1 1 0"),
    "numpy array & causal": (np.array([[True, True, False]]) & causal(), "1 0 0\n1 1 0\n1 1 0"),
    "nothing at all": (EVERYTHING, "1 1\n1 1\n1 1"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    mask, text = PICTURES[name]
    expected = picture(text)
    got = mask.materialise(*expected.shape)
    assert got.dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)


def test_batch_dims_put_a_heads_dim_behind_them():
    stops, offsets, ids = jnp.array([2, 0, 3]), jnp.array([0, 1, -1]), jnp.array([[0, 0, 1], [1, 1, 1], [-1, 2, 2]])
    np.testing.assert_array_equal(KeyLengths(stops).materialise(2, 3), np.broadcast_to(lengths(2, 3, stops), (3, 1, 2, 3)))
    np.testing.assert_array_equal(causal(offsets).materialise(3, 3), band(3, 3, -1, 0, offsets))
    np.testing.assert_array_equal(SegmentIds(ids).materialise(3, 3), same_segment(ids, ids))
    both = causal(offsets) & KeyLengths(stops) & SegmentIds(ids)
    np.testing.assert_array_equal(
        both.materialise(3, 3), band(3, 3, -1, 0, offsets) & lengths(3, 3, stops) & same_segment(ids, ids)
    )


def test_and_is_the_conjunction_and_keeps_order():
    a, b, c = causal(), KeyLengths(2), Dense(jnp.ones((1, 3), bool))
    assert isinstance(a & b, And)
    assert (a & b & c).parts(3, 3) == (a, b, c)
    assert [type(part) for part in ((a & b) & (c & causal_lower_right(3, 3))).parts(3, 3)] == [Band, KeyLengths, Dense, Band]
    assert conjunction(()) is EVERYTHING
    assert conjunction((a,)) is a


# --- the ranges: what a blockwise backend skips and what it does not mask

ints = st.integers


def draw_packed(draw, L, S):
    """(a mask of packed sequences, its picture by the oracle)."""
    N, distance = 3, ints(-1, 6)
    cu_q, cu_k = (np.sort(draw(st.lists(ints(0, size), min_size=N + 1, max_size=N + 1))) for size in (L, S))
    used_q, used_k = (draw(st.none() | st.just([draw(ints(0, int(slots))) for slots in np.diff(cu)])) for cu in (cu_q, cu_k))
    left, right = draw(distance), draw(distance)
    arrays = (None if x is None else jnp.asarray(x, jnp.int32) for x in (used_q, used_k))
    return Packed(jnp.asarray(cu_q), jnp.asarray(cu_k), left, right, *arrays), packed(L, S, cu_q, cu_k, left, right, used_q, used_k)


def draw_mask(draw, L, S):
    """Any structured mask without batch dims, or a conjunction of two."""
    distance, place = ints(-1, 9), ints(-25, 25)
    kind = draw(st.sampled_from(["band", "traced band", "lengths", "query lengths", "segments", "ranges", "causal bias", "and"]))
    if kind == "band":
        return Band(draw(distance), draw(distance), draw(place))
    if kind == "traced band":
        return Band(draw(distance), draw(distance), jnp.asarray(draw(place)))
    if kind == "lengths":
        return KeyLengths(draw(place), draw(st.none() | place))
    if kind == "query lengths":
        return QueryLengths(draw(place), draw(st.none() | place))
    if kind == "segments":

        def ids(n):
            return jnp.asarray(draw(st.lists(ints(-1, 3), min_size=n, max_size=n)), jnp.int32)

        if L == S and draw(st.booleans()):
            return SegmentIds(ids(L)[jnp.sort(jnp.arange(L) // draw(ints(1, 5)))])  # long runs, some of them padding
        return SegmentIds(ids(L), ids(S))
    if kind == "ranges":
        ends = np.sort([draw(st.lists(ints(0, S), min_size=L, max_size=L)) for _ in range(2)])
        return KeyRanges(jnp.asarray(ends.min(0)), jnp.asarray(ends.max(0)), S)
    if kind == "causal bias":
        return CausalBias(draw(st.sampled_from(CausalVariant)), L, S)
    return draw_mask(draw, L, S) & draw_mask(draw, L, S)


def test_segments_of_self_attention_are_not_sorted_and_know_which_blocks_are_full():
    ids = jnp.asarray([0] * 8 + [1] * 8 + [-1] * 4 + [2] * 4)
    mask = SegmentIds(ids)
    (own,), (apart,) = mask.parts(24, 24), SegmentIds(ids, ids + 0).parts(24, 24)
    for one in (own, own.with_batch((3,)), own.transposed(), own.with_batch((3,)).padded(2, 4), jax.tree.map(lambda x: x, own)):
        assert "sort" not in str(jax.make_jaxpr(lambda one=one: one.key_valid(24, 24))())
    assert "sort" in str(jax.make_jaxpr(lambda: apart.key_valid(24, 24))())
    np.testing.assert_array_equal(own.key_valid(24, 24), apart.key_valid(24, 24))
    for changed in (dataclasses.replace(mask, key=ids + 1), dataclasses.replace(mask, query=ids + 1)):
        assert type(changed.parts(24, 24)[0]) is SegmentIds  # whose keys are not the queries' any more
    assert jax.tree.structure(mask) == jax.tree.structure(SegmentIds(ids, ids + 0))

    def full(mask, *block):
        lo, hi = mask.full_range(*block, 24, 24)
        return (int(lo), int(hi)) if int(lo) < int(hi) else None

    assert [full(mask, *block) for block in ((0, 8), (2, 6), (8, 16), (20, 24))] == [(0, 8), (0, 8), (8, 16), (20, 24)]
    assert [full(mask, *block) for block in ((6, 10), (14, 18), (16, 20), (18, 22), (0, 24))] == [None] * 5
    apart = ids.at[3].set(1)  # another sequence's key among those of this one
    assert [full(SegmentIds(apart), *block) for block in ((4, 8), (0, 4), (8, 16), (20, 24))] == [None] * 3 + [(20, 24)]
    assert full(SegmentIds(ids, apart), 4, 8) is None
    lo, hi = SegmentIds(jnp.stack([ids, apart])).with_batch((2,)).full_range(4, 8, 24, 24)
    assert [*map(int, lo)] == [0, 0]
    assert [*map(int, hi)] == [8, 0]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_ranges_agree_with_keep(data):
    """kv_range covers what keep keeps; inside full_range everything is kept; key_valid hides only what nobody sees."""
    L, S = data.draw(ints(1, 12)), data.draw(ints(1, 14))
    mask = data.draw(st.composite(draw_mask)(L, S))
    lo = data.draw(ints(0, L - 1))
    hi = data.draw(ints(lo + 1, L))
    keep = np.broadcast_to(np.asarray(mask.materialise(L, S)), (L, S))
    start, stop = (int(x) for x in np.broadcast_arrays(*mask.kv_range(lo, hi, L, S), 0)[:2])
    assert 0 <= start <= stop <= S
    outside = np.ones(S, bool)
    outside[start:stop] = False
    assert not keep[lo:hi, outside].any(), f"{mask} keeps keys outside of [{start}, {stop})"
    start, stop = (int(x) for x in np.broadcast_arrays(*mask.full_range(lo, hi, L, S), 0)[:2])
    assert start >= 0
    assert stop <= S
    assert keep[lo:hi, start:stop].all(), f"{mask} is not full in [{start}, {stop})"
    valid = mask.key_valid(L, S)
    valid = np.ones(S, bool) if valid is None else np.broadcast_to(np.asarray(valid), S)
    assert valid[keep.any(0)].all(), f"{mask} hides a key that a query sees"
    np.testing.assert_array_equal(np.broadcast_to(mask.transposed().materialise(S, L), (S, L)), keep.T)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_a_part_of_a_call_sees_what_the_call_keeps_there(data):
    """`seen_from`, with ids cut to the part; places as ints and traced."""
    L, S = data.draw(ints(1, 12)), data.draw(ints(1, 14))
    mask = data.draw(st.composite(draw_mask)(L, S))
    q0, k0 = data.draw(ints(0, L - 1)), data.draw(ints(0, S - 1))
    keep = np.broadcast_to(np.asarray(mask.materialise(L, S)), (L, S))[q0:, k0:]

    def cut(mask):
        parts = [cut(part) for part in mask.masks] if isinstance(mask, And) else []
        return And(tuple(parts)) if parts else mask.local(lambda x: x, lambda x: x[..., q0:], lambda x: x[..., k0:])

    part = cut(mask)
    for places in ((q0, k0), (jnp.int32(q0), jnp.int32(k0))):
        found = part.seen_from(*places).materialise(L - q0, S - k0)
        np.testing.assert_array_equal(np.broadcast_to(found, (1, 1, *keep.shape))[0, 0], keep)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_packed_masks_are_their_picture_and_so_are_their_ranges(data):
    """As given, transposed, and as the call sees them; keys that nobody sees are known exactly, and ranges are no wider than rows."""
    L, S = 9, 11  # one shape: what runs eagerly is compiled once
    mask, keep = data.draw(st.composite(draw_packed)(L, S))
    (ranges,) = mask.parts(L, S)
    for same in (mask, ranges, mask.transposed().transposed(), ranges.transposed().transposed(), ranges.padded(3, 5)):
        np.testing.assert_array_equal(same.materialise(L, S), keep)
    assert not np.asarray(ranges.padded(3, 5).materialise(L + 3, S))[L:].any()
    q0, k0 = data.draw(ints(0, L - 1)), data.draw(ints(0, S - 1))
    part = ranges.local(lambda x: x, lambda x: x[q0:], lambda x: x[k0:]).seen_from(q0, k0)
    np.testing.assert_array_equal(part.materialise(L - q0, S - k0), keep[q0:, k0:])
    np.testing.assert_array_equal(part.transposed().materialise(S, L - q0)[: S - k0], keep[q0:, k0:].T)
    np.testing.assert_array_equal(mask.key_valid(L, S), keep.any(0))
    lo, hi = data.draw(ints(0, L - 1)), data.draw(ints(1, L + 4))
    seen = np.flatnonzero(keep[lo : max(hi, lo + 1)].any(0))
    start, stop = ranges.kv_range(lo, max(hi, lo + 1), L, S)
    assert seen.size == 0 or (start <= seen[0] and stop > seen[-1])
    first, last = (np.flatnonzero(keep[row]) for row in (lo, min(max(hi, lo + 1), L) - 1))
    if first.size and last.size:
        assert (start, stop) == (first[0], last[-1] + 1)
        assert ranges.full_range(lo, max(hi, lo + 1), L, S) == (last[0], max(first[-1] + 1, last[0]))


def test_packed_masks_have_batch_dims():
    mask = Packed(jnp.array([[0, 2, 5], [1, 3, 4]]), jnp.array([[0, 3, 7], [0, 4, 5]]), right=0, used_k=jnp.array([2, 1]))
    pictures = [packed(6, 8, cu_q, cu_k, -1, 0, None, [2, 1]) for cu_q, cu_k in zip(mask.cu_seq_q, mask.cu_seq_k, strict=True)]
    for same in (mask, mask.parts(6, 8)[0]):
        np.testing.assert_array_equal(same.materialise(6, 8), np.stack(pictures)[:, None])
    turned = mask.parts(6, 8)[0].transposed().materialise(8, 6)
    np.testing.assert_array_equal(turned, np.stack(pictures)[:, None].swapaxes(-1, -2))


@pytest.mark.parametrize("length", [0, 1, 9, 300])
@pytest.mark.parametrize("entries", [0, 1, 40])
def test_what_is_at_most_each_position_is_counted_as_it_is_searched(length, entries, x64):
    """Repeated entries, some before and some behind all positions, the largest numbers; jitted, mapped, with batch dims."""
    big = np.iinfo(np.int32)
    among = np.random.default_rng(length).integers(-3, length + 5, (2, 3, entries))
    among[0, :, :2], among[1, :, -2:] = big.min, big.max
    among[:, 0] = length // 2
    among = np.sort(among, -1)
    wanted = (among[..., None, :] <= np.arange(length)[:, None]).sum(-1)

    def counted(row):
        return packed_module._at_most_each(row, length)

    for f in (counted, jax.jit(counted), jax.vmap(counted), jax.jit(jax.vmap(jax.vmap(counted)))):
        got = f(jnp.asarray(among, jnp.int32))
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, wanted)
    for row, numbers in zip(among.reshape(6, entries), wanted.reshape(6, length), strict=True):
        row = jnp.asarray(row, jnp.int32)
        np.testing.assert_array_equal(counted(row), numbers)
        np.testing.assert_array_equal(packed_module._at_most(row, np.arange(length)), numbers)


def test_key_valid_hides_what_nobody_sees():
    """Exactly, for each kind alone: these keys may hold NaN."""
    for mask in (
        causal(),
        causal(-2),
        sliding_window(1, 0, 4),
        sliding_window(2, 2, jnp.asarray(-3)),
        KeyLengths(4, 2),
        KeyLengths(0),
        QueryLengths(3, 3),
        QueryLengths(jnp.asarray(0)),
    ):
        keep = np.broadcast_to(mask.materialise(4, 9), (4, 9))
        np.testing.assert_array_equal(np.broadcast_to(mask.key_valid(4, 9), 9), keep.any(0), err_msg=str(mask))
    for mask in (
        causal() & QueryLengths(2),
        QueryLengths(jnp.asarray(3), jnp.asarray(1)) & sliding_window(1, 0, 2) & KeyLengths(4),
        QueryLengths(3, 3) & causal(1),
    ):
        keep = np.broadcast_to(np.asarray(mask.materialise(4, 9)), (1, 1, 4, 9)).any((0, 1, 2))
        np.testing.assert_array_equal(np.broadcast_to(mask.key_valid(4, 9), 9), keep, err_msg=str(mask))
        queries = np.broadcast_to(np.asarray(mask.materialise(4, 9)), (1, 1, 4, 9)).any((0, 1, 3))
        np.testing.assert_array_equal(np.broadcast_to(mask.transposed().key_valid(9, 4), 4), queries, err_msg=str(mask))
    ids = SegmentIds(jnp.array([2, 0, -1, 0]), jnp.array([0, 1, 2, -1, 3, 0]))
    np.testing.assert_array_equal(ids.key_valid(4, 6), [1, 0, 1, 0, 0, 1])
    (own,) = SegmentIds(jnp.array([2, 0, -1, 0])).parts(4, 4)
    np.testing.assert_array_equal(own.key_valid(4, 4), [1, 1, 0, 1])
    assert causal(5).key_valid(4, 9) is None
    assert EVERYTHING.key_valid(4, 9) is None


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])
def test_keys_behind_the_last_query_that_exists_may_be_nan(backend):
    """Under a causal mask they are nobody's, like those behind a length of keys; gradients too."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 1, 8)), jnp.float32)

    def call(query, key):
        with sdpa_kernel(backend):
            return dot_product_attention(query, key, key, query_seq_lengths=jnp.array([2]), is_causal=True)

    poisoned = x.at[:, 2:].set(jnp.nan)
    np.testing.assert_array_equal(call(x, poisoned), call(x, x))
    grads = [jax.grad(lambda q, k: call(q, k).sum(), (0, 1))(x, key) for key in (poisoned, x)]
    jax.tree.map(np.testing.assert_array_equal, *grads)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int64"])
def test_integers_of_any_width_will_do(dtype, x64):
    if dtype == "int64" and not x64:
        return
    L, S = 200, 300
    small = np.array([100, 7], dtype)
    for mask, keep in [
        (KeyLengths(small, small // 2), lengths(L, S, small, small // 2)),
        (QueryLengths(small), np.arange(L)[None, None, :, None] < small.astype(int)[:, None, None, None]),
        (causal(small), band(L, S, -1, 0, small)),
        (sliding_window(3, 4, small), band(L, S, 3, 4, small)),
        (SegmentIds(np.arange(L).astype("uint8") // 50 // np.array([[1], [2]], dtype), np.arange(S).astype(dtype) % 3), None),
    ]:
        mask = jax.tree.map(jnp.asarray, mask)
        picture = np.asarray(mask.materialise(L, S))
        if keep is not None:
            np.testing.assert_array_equal(
                np.broadcast_to(picture, (2, 1, L, S)), np.broadcast_to(keep, (2, 1, L, S)), err_msg=str(type(mask))
            )
        seen = np.broadcast_to(picture, (2, 1, L, S)).any(-2)[:, 0]
        valid = mask.key_valid(L, S)
        assert valid is None or (np.asarray(valid) | ~seen).all()
        lo, hi = (np.broadcast_to(np.asarray(bound).astype(int).reshape(-1), 2) for bound in mask.kv_range(10, 20, L, S))
        for b in range(2):
            block = np.broadcast_to(picture, (2, 1, L, S))[b, 0, 10:20]
            assert not block[:, : lo[b]].any()
            assert not block[:, hi[b] :].any()


def test_static_masks_answer_with_ints_so_that_blocks_are_skipped_while_tracing():
    for mask in (causal(), sliding_window(3, 0, 2), causal_lower_right(8, 16), causal() & sliding_window(3, -1)):
        for bound in (*mask.kv_range(4, 8, 8, 16), *mask.full_range(4, 8, 8, 16)):
            assert isinstance(bound, int)
    assert causal_lower_right(8, 16).kv_range(0, 4, 8, 16) == (0, 12)
    assert sliding_window(3, 0).kv_range(8, 12, 16, 16) == (5, 12)
    assert sliding_window(3, 0).full_range(8, 10, 16, 16) == (6, 9)


def test_keep_is_plain_arithmetic_for_numpy_jit_and_traced_positions():
    mask = causal(1) & sliding_window(2, 0, 1) & KeyLengths(jnp.asarray(5))
    q_idx, k_idx = np.arange(3, 7)[:, None], np.arange(2, 9)[None, :]
    traced = jax.jit(lambda mask, q0, k0: mask.keep(q0 + jnp.arange(4)[:, None], k0 + jnp.arange(7)[None, :]))(mask, 3, 2)
    np.testing.assert_array_equal(mask.keep(q_idx, k_idx), traced)
    np.testing.assert_array_equal(
        Dense(jnp.arange(12).reshape(3, 4) % 3 == 0).keep(np.array([[2]]), np.array([[1, 3]])), [[True, False]]
    )


# --- masks are values

VALUES = [
    causal(), sliding_window(3, 1, 4), causal(jnp.array([1, 2])), KeyLengths(jnp.array([1, 2])), KeyLengths(jnp.array([3, 3]), jnp.array([1, 2])),
    QueryLengths(jnp.array([1, 2])), SegmentIds(jnp.zeros((2, 4), int), jnp.zeros((2, 4), int)), Dense(jnp.ones((2, 1, 1, 4), bool)),
    causal_lower_right(4, 4), causal() & KeyLengths(jnp.array([1, 2])), KeyRanges(jnp.array([0, 0, 1, 2]), jnp.array([1, 2, 3, 4])),
    Packed(jnp.array([0, 2, 4]), left=1, used_k=jnp.array([1, 2])),
]  # fmt: skip


@pytest.mark.parametrize("mask", VALUES, ids=lambda mask: type(mask).__name__)
def test_masks_are_frozen_pytrees(mask):
    leaves, treedef = jax.tree.flatten(mask)
    again = jax.tree.unflatten(treedef, leaves)
    assert type(again) is type(mask)
    assert jax.tree.structure(again) == treedef
    assert hash(treedef) is not None
    np.testing.assert_array_equal(again.materialise(4, 4), mask.materialise(4, 4))
    np.testing.assert_array_equal(jax.jit(lambda m: m.materialise(4, 4))(mask), mask.materialise(4, 4))
    assert jax.tree.structure(jax.eval_shape(lambda m: m, mask)) == treedef
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(mask, dataclasses.fields(mask)[0].name, 0)


def test_masks_map_over_their_arrays():
    stops = jnp.arange(5)
    pictures = jax.vmap(lambda mask: mask.materialise(2, 4))(KeyLengths(stops))
    np.testing.assert_array_equal(pictures, [KeyLengths(n).materialise(2, 4) for n in range(5)])
    offsets = jax.vmap(lambda mask: mask.materialise(2, 4))(causal(stops))
    np.testing.assert_array_equal(offsets, [causal(n).materialise(2, 4) for n in range(5)])


def test_static_masks_do_not_retrace_jit_and_others_do():
    traces = []

    @jax.jit
    def f(mask):
        traces.append(mask)
        return mask.materialise(2, 3)

    for mask in (causal(), causal(), causal(1), KeyLengths(jnp.array([1])), KeyLengths(jnp.array([2]))):
        f(mask)
    assert len(traces) == 3


# --- torch's mirror


def test_torch_names():
    assert [(variant.name, int(variant)) for variant in CausalVariant] == [("UPPER_LEFT", 1), ("LOWER_RIGHT", 2)]
    assert causal_upper_left(3, 5) == CausalBias(CausalVariant.UPPER_LEFT, 3, 5)
    assert causal_lower_right(3, 5) == CausalBias(CausalVariant.LOWER_RIGHT, 3, 5)
    assert all(hasattr(bias_module, name) for name in bias_module.__all__)


@pytest.mark.torch
@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4)])
def test_causal_biases_are_torchs(sizes):
    import warnings

    from torch.nn.attention import bias as theirs

    for name in ("causal_upper_left", "causal_lower_right"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the NaN that it no longer produces
            wanted = getattr(theirs, name)(*sizes)._materialize().numpy()
        keep = wanted if wanted.dtype == bool else wanted == 0
        np.testing.assert_array_equal(getattr(bias_module, name)(*sizes).materialise(*sizes), keep)


# --- errors

ONES = jnp.ones((2, 3, 4, 8))
ERRORS = {
    "left too small": (lambda: Band(-2, 0), ValueError, "left must be an int >= -1"),
    "right no int": (lambda: sliding_window(1, 2.0), ValueError, "right must be an int >= -1"),
    "window of bool": (lambda: sliding_window(True, 0), ValueError, "left must be an int"),
    "offset bool": (lambda: causal(True), TypeError, "offset must be an int or an integer array, got a bool"),
    "offset float": (lambda: causal(1.5), TypeError, "offset must be an integer array"),
    "offset float array": (lambda: causal(jnp.ones(2)), TypeError, "offset must be an integer array, got float32"),
    "lengths float": (lambda: KeyLengths(jnp.ones(2)), TypeError, "lengths must be an integer array, got float32"),
    "starts float": (lambda: KeyLengths(jnp.ones(2, int), jnp.ones(2)), TypeError, "starts must be an integer array"),
    "query lengths float": (lambda: QueryLengths(jnp.ones(2)), TypeError, "lengths must be an integer array"),
    "segments float": (lambda: SegmentIds(jnp.ones(4)), TypeError, r"SegmentIds.query must be an integer array"),
    "segments scalar": (lambda: SegmentIds(jnp.asarray(4)), ValueError, "one id per position"),
    "ranges float": (lambda: KeyRanges(jnp.ones(4), jnp.ones(4)), TypeError, r"KeyRanges.first must be an integer array"),
    "sizes of ranges": (lambda: scaled_dot_product_attention(ONES, ONES, ONES, KeyRanges(jnp.zeros(5, int), jnp.zeros(5, int))), ValueError, "one range per query, 4 here"),
    "ranges without a number of keys": (lambda: KeyRanges(jnp.zeros(4, int), jnp.zeros(4, int)).transposed(), ValueError, "needs keys=S"),
    "boundaries float": (lambda: Packed(jnp.ones(4)), TypeError, r"Packed.cu_seq_q must be an integer array"),
    "boundaries scalar": (lambda: Packed(jnp.asarray(4)), ValueError, r"cu_seq_q must have shape \(batch..., N \+ 1\)"),
    "boundaries of other sequences": (lambda: Packed(jnp.arange(4), jnp.arange(3)), ValueError, r"Packed.cu_seq_k must have shape \(batch..., N \+ 1\), N = 3 sequences"),
    "used of other sequences": (lambda: Packed(jnp.arange(4), used_k=jnp.arange(4)), ValueError, r"Packed.used_k must have shape \(batch..., N\), N = 3 sequences"),
    "window of packed sequences": (lambda: Packed(jnp.arange(4), left=-2), ValueError, "left must be an int >= -1"),
    "combined with an int array": (lambda: causal() & jnp.ones((2, 2), int), TypeError, "bool or float arrays, got int32"),
    "combined with a list": (lambda: causal() & [True], TypeError, "bool or float arrays, got list"),
    "combined from the left": (lambda: np.ones((2, 2), int) & causal(), TypeError, "bool or float arrays, got int"),
    "as_mask": (lambda: as_mask(3), TypeError, "got int"),
    "float mask has no keep": (lambda: Dense(jnp.ones((2, 2))).materialise(2, 2), TypeError, "adds to the scores"),
    "variant": (lambda: CausalBias(1, 2, 3), TypeError, "must be a CausalVariant"),
    "sizes of a causal bias": (lambda: scaled_dot_product_attention(ONES, ONES, ONES, causal_upper_left(5, 5)), ValueError, r"lengths \(5, 5\), the call has L=4, S=4: make it with causal_upper_left\(4, 4\)"),
    "sizes of segments": (lambda: scaled_dot_product_attention(ONES, ONES, ONES, SegmentIds(jnp.zeros(5, int))), ValueError, "one id per query and per key, 4 and 4 here, got 5 and 5"),
    "batch of lengths": (lambda: scaled_dot_product_attention(ONES, ONES, ONES, KeyLengths(jnp.ones(3, int))), ValueError, r"KeyLengths.lengths must have batch dims that broadcast to the call's \(2,\), got \(3,\)"),
    "rank of offsets": (lambda: scaled_dot_product_attention(ONES, ONES, ONES, causal(jnp.ones((2, 3), int))), ValueError, "Band.offset must have batch dims"),
    "batch of segments": (lambda: scaled_dot_product_attention(ONES, ONES, ONES, SegmentIds(jnp.zeros((3, 4), int))), ValueError, "SegmentIds.query must have batch dims"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_tile_asks_a_mask_that_holds_its_own_numbers_and_ids():
    """`local` is what a kernel does: one batch entry's numbers, one tile's ids; keep() of it is that part of the picture."""
    from pallas_kernels.contracts import Ids

    ids = np.array([[0, 0, 1, 1, 1, -1], [2, 2, 2, 0, 0, 0]])
    mask = causal(jnp.array([0, 2])) & KeyLengths(jnp.array([6, 5]), jnp.array([1, 0])) & SegmentIds(jnp.asarray(ids)) & Band(3, 1)
    whole = np.broadcast_to(mask.materialise(6, 6), (2, 1, 6, 6))
    for b, rows, columns in ((0, slice(0, 3), slice(2, 6)), (1, slice(2, 6), slice(0, 5))):
        local = mask.local(
            lambda x, b=b: x[b], lambda x, b=b, r=rows: Ids(x[b, r, None]), lambda x, b=b, c=columns: Ids(x[b, None, c])
        )
        got = local.keep(np.arange(6)[rows, None], np.arange(6)[None, columns])
        np.testing.assert_array_equal(got, whole[b, 0, rows, columns])


def test_a_tile_of_ranges_may_count_keys_from_its_own_first_one():
    from pallas_kernels.contracts import Ids

    mask = Packed(jnp.array([[0, 3, 6], [0, 1, 5]]), right=0).parts(6, 6)[0]
    whole = mask.materialise(6, 6)
    for b, rows, start in ((0, slice(1, 5), 2), (1, slice(0, 6), 0)):
        local = mask.local(None, lambda x, b=b, r=rows: Ids(x[b, r, None]), None)
        got = local.moved(start).keep(np.arange(6)[rows, None] - start, np.arange(6 - start)[None])
        np.testing.assert_array_equal(got, whole[b, 0, rows, start:])
