"""A bool mask in the words that a kernel's threads want: by XLA, by our kernels on a GPU, and taken apart again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize(("rows", "block_k"), [(128, 128), (192, 128), (128, 64), (64, 192), (128, 256)])
@pytest.mark.parametrize(("L", "S"), LENGTHS)
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
    some, every = dense.summary(words, row_tiles, tiles, block_k)
    np.testing.assert_array_equal(some, by_tile.any((3, 5)))
    np.testing.assert_array_equal(every, by_tile.all((3, 5)))


@pytest.mark.parametrize("block_k", [64, 128, 192, 256])
def test_a_tile_of_words_is_taken_apart_as_it_was_packed(block_k):
    keep = drawn(1, 1, 64, block_k)
    pieces = dense.pack(jnp.asarray(keep), 64, block_k)[0, 0]
    halves = [half for piece in pieces for half in (piece, piece >> 16)]  # a kernel moves the second half into the low bits
    words = list(pieces) if block_k % 128 == 0 else halves[: block_k // 64]
    np.testing.assert_array_equal(dense.unpack(words, block_k), keep[0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "H", "L", "S"),
    [(1, 1, 64, 128), (1, 2, 128, 1024), (2, 3, 200, 256), (2, 1, 1000, 640), (1, 1, 1, 128), (4, 1, 2048, 4096)],
)
def test_the_packing_kernels_write_the_same_words(B, H, L, S):
    keep = jnp.asarray(drawn(B, H, L, S))
    for rows, block_k in ((128, 128), (192, 128), (128, 64)):
        words = jax.jit(lambda keep, rows=rows, k=block_k: hopper_packing.packed(keep, rows, k))(keep)
        np.testing.assert_array_equal(words, dense.pack(keep, rows, block_k))
    for rows in (64, 128):
        words = jax.jit(lambda keep, rows=rows: hopper_packing.packed(keep, rows, 64, transposed=True))(keep)
        np.testing.assert_array_equal(words, dense.pack(jnp.swapaxes(keep, 2, 3), rows, 64))
