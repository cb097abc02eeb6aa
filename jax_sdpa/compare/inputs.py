"""The tensors of a comparison: drawn from a seed, or read from the user's file; NumPy arrays in the case's dtype.

Both frameworks and the float64 oracle get the same numbers: they are rounded to the dtype first, and widened exactly.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_sdpa.compare.cases import Arrays, Case, Shape
from jax_sdpa.compare.extras import need

DTYPES = ("float16", "bfloat16", "float32", "float64")
OPERANDS = ("query", "key", "value", "attn_mask")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The operands of a call by name, and the seed of what else is drawn for it."""

    arrays: Arrays
    seed: tuple[int, ...]

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The operands that have a gradient: query, key, value, and attn_mask where it is float."""
        return tuple(name for name in OPERANDS if name in self.arrays and jnp.issubdtype(self.arrays[name].dtype, jnp.floating))

    def dout(self, shape: tuple[int, ...]) -> np.ndarray:
        """The cotangent of the output: gradients are those of sum(out * dout). Unit normals in the query's dtype."""
        return np.random.default_rng([*self.seed, 1]).standard_normal(shape).astype(self.arrays["query"].dtype)


def _seed(case: str, seed: int) -> tuple[int, ...]:
    return seed, zlib.crc32(case.encode())  # a case draws the same, whatever runs beside it


def draw(case: Case, size: str, seed: int) -> Inputs:
    """The inputs of a named case: unit normals, or uniform in [0, 1) where the case says so."""
    shape, rng, dtype = case.shape(size), np.random.default_rng(_seed(case.name, seed)), jnp.dtype(case.dtype)

    def tensor(*sizes: int) -> np.ndarray:
        return rng.random(sizes) if case.uniform else rng.standard_normal(sizes)

    arrays = {
        "query": (case.query_std * tensor(shape.B, shape.Hq, shape.L, shape.E)).astype(dtype),
        "key": tensor(shape.B, shape.H, shape.S, shape.E).astype(dtype),
        "value": tensor(shape.B, shape.H, shape.S, shape.Ev).astype(dtype),
    }
    if case.extras is not None:
        arrays |= case.extras(shape, rng)
    return Inputs(arrays, _seed(case.name, seed))


def _load_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _load(path: Path) -> Arrays:
    """The arrays of a file; ValueError for whatever keeps it from being read."""
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} must be an .npz or a .safetensors file.")
    load = _load_npz if path.suffix == ".npz" else need("safetensors.numpy").load_file
    try:
        return dict(load(path))
    except Exception as error:  # each library has its own for a file that is missing, cut off or something else
        raise ValueError(f"{path} can't be read: {error}") from error


def _two_byte_voids(arrays: Arrays) -> Arrays:
    """NumPy saves bfloat16 as bytes without a name (`|V2`); nothing else that can be meant here looks so."""
    bfloat16 = jnp.dtype("bfloat16")
    return {name: array.view(bfloat16) if array.dtype == np.dtype("V2") else array for name, array in arrays.items()}


def read(
    path: Path,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dtype: str | None = None,
    seed: int = 0,
) -> tuple[Case, Inputs]:
    """The user's own tensors, `query`, `key`, `value` and perhaps `attn_mask`, and the call that they are for.

    Args:
        path: .npz or .safetensors. query, key, value as torch lays them out, (..., H, L, E).
        is_causal, scale, enable_gqa: the call's.
        dtype: what to round query, key and value (and a float attn_mask that is not float32) to; default: what they are.

    Raises:
        ValueError: a tensor is missing or one too many, or of a dtype that attention has not; or the file can't be read.
    """
    arrays = _two_byte_voids(_load(path))
    missing = [name for name in OPERANDS[:3] if name not in arrays]
    surplus = [name for name in arrays if name not in OPERANDS]
    if missing or surplus:
        raise ValueError(f"{path} must hold query, key, value and perhaps attn_mask, got {', '.join(sorted(arrays)) or 'nothing'}.")
    arrays = {name: arrays[name] for name in OPERANDS if name in arrays}
    if dtype is not None:
        arrays = {name: _rounded(array, name, dtype) for name, array in arrays.items()}
    query, key, value = (arrays[name] for name in OPERANDS[:3])
    if query.dtype.name not in DTYPES:
        raise ValueError(f"{path}: query must be of dtype {', '.join(DTYPES)}, got {query.dtype}; round it with --dtype.")
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ValueError(
            f"{path}: query, key and value must be at least 2 dimensional, got {query.shape}, {key.shape}, {value.shape}."
        )
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": enable_gqa} | ({} if scale is None else {"scale": scale})
    options = {name: option for name, option in options.items() if option is not False}

    def user_call(F: Any, query: Any, key: Any, value: Any, attn_mask: Any = None) -> Any:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    shape = _shape_of(query, key, value)
    case = Case(
        path.name, f"your tensors, {', '.join(f'{name}={option}' for name, option in options.items()) or 'no options'}", str(path),
        query.dtype.name, shape, shape, user_call,
    )  # fmt: skip
    return case, Inputs(arrays, _seed(path.name, seed))


def _rounded(array: np.ndarray, name: str, dtype: str) -> np.ndarray:
    kept = not jnp.issubdtype(array.dtype, jnp.floating) or (name == "attn_mask" and array.dtype == np.float32)
    return array if kept else array.astype(jnp.dtype(dtype))


def _shape_of(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> Shape:
    """The sizes to print: leading dims as one batch, one head where there is no heads dim."""
    heads = lambda x: x.shape[-3] if x.ndim > 2 else 1  # noqa: E731
    batch = int(np.prod(query.shape[:-3], dtype=int))
    return Shape(batch, heads(query), heads(key), query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
