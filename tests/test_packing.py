"""A bool mask in the words that a kernel's threads want: by XLA, by our kernels on a GPU, and taken apart again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sdpa.attention.bias import causal
from pallas_kernels import dense, hopper_packing


def picture(words, rows, columns):
    """The bools (B, H, rows, columns) that the words stand for: bit 2j + e of word t of a piece is column 8j + 2t + e."""
    column = np.arange(columns)
    piece, rest = np.divmod(column, 128)
    words = np.moveaxis(np.asarray(words), 3, 2)[:, :, :rows, piece, rest // 2 % 4]
    return (words >> (rest // 8 * 2 + rest % 2)) & 1 == 1


def drawn(*shape):
    return np.random.default_rng(sum(shape)).random(shape) < 0.5


LENGTHS = [(1, 300), (8, 64), (64, 128), (70, 500), (127, 129), (128, 256), (200, 300)]


@pytest.mark.parametrize(
    ("L", "S", "rows", "block_k"),
    [(*size, *tile) for size in LENGTHS for tile in ((128, 128), (64, 192))]
    + [(*size, *tile) for size in ((70, 500), (200, 300)) for tile in ((192, 128), (128, 64), (128, 256))],
)
def test_words_stand_for_their_bools_and_the_rest_is_masked(L, S, rows, block_k):
    keep = drawn(2, 1, L, S)
    keep[:, :, :128, :128] = True  # so that some tile is whole
    keep[:, :, :, 256:] = False
    words = dense.pack(jnp.asarray(keep), rows, block_k)
    length, columns, tiles = words.shape[3], 128 * words.shape[2], -(-S // block_k)
    assert length == (1 if L == 1 else -(-L // rows) * rows)
    assert 0 <= columns - tiles * block_k < 128
    wanted = np.zeros((2, 1, length, columns), bool)
    wanted[:, :, :L, :S] = keep
    np.testing.assert_array_equal(picture(words, length, columns), wanted)
    row_tiles = -(-length // rows)
    by_tile = wanted[..., : tiles * block_k].reshape(2, 1, row_tiles, length // row_tiles, tiles, block_k)
    some, every = dense.summary(words, L, row_tiles, tiles, block_k)
    np.testing.assert_array_equal(some, by_tile.any((3, 5)))
    beyond = (np.arange(length) >= L).reshape(row_tiles, -1, 1, 1)
    np.testing.assert_array_equal(every, (by_tile | beyond).all((3, 5)))


@pytest.mark.parametrize(
    ("name", "once"),
    [
        ("random", False),
        ("causal", True),
        ("padding", True),
        ("two tiles of a row cut", False),
        ("nothing", True),
        ("everything", True),
    ],
)
def test_a_list_has_the_tiles_that_are_cut_first_and_knows_whether_there_is_but_one(name, once):
    L, S = 200, 512
    q, k = np.arange(L)[:, None], np.arange(S)[None, :]
    keep = {
        "random": drawn(L, S), "causal": k <= q + 128, "padding": (k >= 130) & (q >= 0), "two tiles of a row cut": (k > 5) & (k < 500),
        "nothing": np.zeros((L, S), bool), "everything": np.ones((L, S), bool),
    }[name]  # fmt: skip
    keep = np.broadcast_to(keep, (1, 1, L, S))
    table = np.asarray(dense.listed(dense.pack(jnp.asarray(keep), 128, 128), None, 128, L, S, 128))
    assert (table[..., -1] == once).all()
    for row, rows in enumerate((keep[0, 0, :128], keep[0, 0, 128:])):
        steps, *entries = table[0, 0, row, :-1]
        tiles = {t: rows[:, 128 * t : 128 * (t + 1)] for t in range(4)}
        cut = [t for t in (3, 2, 1, 0) if tiles[t].any() and not tiles[t].all()]
        full = [t for t in (3, 2, 1, 0) if tiles[t].all()]
        wanted = [2 * t + 1 for t in cut] + [2 * t for t in full]
        assert entries[:steps] == (wanted or [7])  # a step is left to every row tile: its last tile, with the mask


def test_a_mask_of_keys_is_listed_once_for_all_row_tiles():
    L, S = 1000, 512
    keep = np.arange(S) < np.array([512, 300, 0])[:, None, None, None]
    table = np.asarray(dense.listed(dense.pack(jnp.asarray(keep), 128, 128), None, 128, L, S, 128))
    assert table.shape == (3, 1, 1, 6)
    assert table[0, 0, 0].tolist() == [4, 6, 4, 2, 0, 1]
    assert table[1, 0, 0, [0, 1, 2, 3, 5]].tolist() == [3, 5, 2, 0, 1]  # tile 2 is cut
    assert table[2, 0, 0, :2].tolist() == [1, 7]
    beside = np.asarray(dense.listed(dense.pack(jnp.asarray(keep), 128, 128), causal(), 128, L, S, 128))
    assert beside.shape == (3, 1, 8, 6)


def test_one_head_of_one_batch_entry_or_a_structured_mask_may_cut_a_second_tile():
    L, S = 128, 512
    keep = np.broadcast_to(np.arange(S) < 500, (2, 2, L, S)).copy()

    def once(keep, mask=None):
        table = np.asarray(dense.listed(dense.pack(jnp.asarray(keep), 128, 128), mask, 128, L, S, 128))
        return np.unique(table[..., -1]).tolist()

    assert once(keep) == [1]
    assert once(keep[:1, :1, :1], causal(S - L).with_batch((1,))) == [1]  # both cut the last tile
    assert once(keep[:1, :1, :1], causal(S - L - 64).with_batch((1,))) == [0]
    keep[1, 0, 5, 3] = False
    assert once(keep) == [0]


@pytest.mark.parametrize("block_k", [64, 128, 192, 256])
def test_a_tile_of_words_is_taken_apart_as_it_was_packed(block_k):
    keep = drawn(1, 1, 64, block_k)
    pieces = dense.pack(jnp.asarray(keep), 64, block_k)[0, 0]
    halves = [half for piece in pieces for half in (piece, piece >> 16)]  # a kernel moves the second half into the low bits
    words = list(pieces) if block_k % 128 == 0 else halves[: block_k // 64]
    np.testing.assert_array_equal(dense.unpack(words, block_k), keep[0, 0])


def kernels(keep, rows, block_k, transposed=False):
    """(the words that `packed` gives, whether a kernel of ours makes them)."""
    call = jax.jit(lambda keep: hopper_packing.packed(keep, rows, block_k, transposed=transposed))
    text = call.trace(keep).lower(lowering_platforms=("cuda",)).as_text()
    return call, "mosaic_gpu" in text


WHOLE = [(1, 2, 128, 1024), (2, 3, 256, 640), (1, 1, 384, 384), (2, 1, 128, 192), (4, 1, 2048, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "block_k"), [(128, 128), (192, 128), (128, 64), (64, 192), (128, 256)])
@pytest.mark.parametrize("shape", [*WHOLE, (2, 1, 200, 768), (1, 1, 1000, 384)], ids=str)
def test_across_writes_the_same_words(shape, rows, block_k):
    keep = jnp.asarray(drawn(*shape))
    call, ours = kernels(keep, rows, block_k)
    assert ours == (shape[3] % 128 == 0 == shape[3] % block_k)
    np.testing.assert_array_equal(call(keep), dense.pack(keep, rows, block_k))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_down_writes_the_same_words(shape, rows):
    keep = jnp.asarray(drawn(*shape))
    call, ours = kernels(keep, rows, 64, transposed=True)
    assert ours == (shape[3] % rows == 0)
    np.testing.assert_array_equal(call(keep), dense.pack(jnp.swapaxes(keep, 2, 3), rows, 64))
