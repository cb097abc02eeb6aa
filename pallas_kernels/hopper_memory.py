"""How operands lie in a Hopper program's shared memory and in global memory."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)

WORDS = plgpu.Layout.TILED(Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)
"""Of an array (rows, 4): the four threads that hold a row of TILE have one each."""


def swizzle_of(dim: int, dtype: Any) -> tuple[int, int]:
    """(bytes of the swizzle, the columns that it spans): the widest of which `dim` is a multiple."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(dim * bits, "attention tile")
    return swizzle, 8 * swizzle // bits


def transforms(dim: int, dtype: Any) -> tuple[Any, ...]:
    """The layout in shared memory that wgmma and TMA share."""
    swizzle, columns = swizzle_of(dim, dtype)
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)


def tile(rows: tuple[int, ...], dim: int, dtype: Any) -> Any:
    """Shared memory (*rows, dim) that TMA fills and wgmma reads."""
    return plgpu.SMEM((*rows, dim), dtype, transforms=transforms(dim, dtype))


def rows_of(layout: str, ref: Any, b: Any, start: Any, length: int, h: Any) -> Any:
    """Rows [start, start + length) of one head of an operand in 'BHLE' or 'BLHE'."""
    return ref.at[b, h, pl.ds(start, length)] if layout == "BHLE" else ref.at[b, pl.ds(start, length), h]
