"""The ring of a bias in shared memory: its tiles, or its numbers for their columns, which TMA brings.

bias_ready   loader -> computers    they have arrived
bias_free    computers -> loader    every computing warpgroup has read them (`hopper_scores.Rows`)
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_memory import transforms
from pallas_kernels.hopper_program import slot
from pallas_kernels.hopper_recipe import Recipe, Refs, shared


def is_brought(recipe: Recipe) -> bool:
    """Whether there is such a ring: other biases are read where they lie."""
    return recipe.bias_kind in ("tile", "column")


def tile(rows: tuple[int, ...], columns: int, bias: Any) -> Any:
    """Shared memory (*rows, columns) for tiles of a bias, or of its gradient. bias: what has its last sizes and dtype."""
    return plgpu.SMEM((*rows, columns), bias.dtype, transforms=transforms(math.gcd(columns, bias.shape[-1]), bias.dtype))


def ring(recipe: Recipe, bias: Any) -> dict[str, Any]:
    """Its memory and its barriers, for a kernel's scratch_types; bias: as of `tile`."""
    if not is_brought(recipe):
        return {}
    config = recipe.config
    rows, columns = (config.block_k, config.rows) if recipe.bias_crossed else (config.rows, config.block_k)
    if recipe.bias_kind == "column":
        memory = plgpu.SMEM((config.bias_stages, columns), jnp.float32)
    else:
        memory = tile((config.bias_stages, rows), columns, bias)
    return {
        "bias_s": memory,
        "bias_ready": plgpu.Barrier(num_barriers=config.bias_stages),
        "bias_free": plgpu.Barrier(num_arrivals=config.rows // config.block_q, num_barriers=config.bias_stages),
    }


def rings(recipe: Recipe, refs: Refs) -> list[tuple[Any, Any, int]]:
    """(ready, free, stages) of the ring, if there is one."""
    return [(refs.bias_ready, refs.bias_free, recipe.config.bias_stages)] if is_brought(recipe) else []


def drained(recipe: Recipe, refs: Refs) -> list[tuple[Any, int]]:
    """(free, stages) of the ring, if there is one, as `hopper_program.drain` wants it."""
    return [(free, stages) for _, free, stages in rings(recipe, refs)]


def bring(recipe: Recipe, refs: Refs, b: Any, h: Any, row_tile: Any, column_tile: Any, number: Any) -> None:
    """Ask for a tile, or for the numbers for its columns, the ring's of that number, as soon as there is room."""
    if not is_brought(recipe):
        return
    config = recipe.config
    now = slot(number, config.bias_stages)
    pl.when(number >= config.bias_stages)(lambda: plgpu.barrier_wait(refs.bias_free.at[now]))
    rows, columns = pl.ds(row_tile * config.rows, config.rows), pl.ds(column_tile * config.block_k, config.block_k)
    where = (columns,) if recipe.bias_kind == "column" else (columns, rows) if recipe.bias_crossed else (rows, columns)
    plgpu.copy_gmem_to_smem(refs.bias.at[(*shared(refs.bias, b, h), *where)], refs.bias_s.at[now], refs.bias_ready.at[now])
