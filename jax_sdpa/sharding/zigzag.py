"""Which piece of a sequence lies on which device: in order, or in the zig-zag that balances a causal mask.

    contiguous   device i of n holds piece i of n                       4 devices: 0 | 1 | 2 | 3
    zigzag       device i of n holds pieces i and 2n - 1 - i of 2n      4 devices: 0 7 | 1 6 | 2 5 | 3 4

Under a causal mask a query sees what lies before it: in order, the first device has little to do and the last one most; in the
zig-zag every device has the same. Source: Llama 3's context parallelism (arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

ORDERS = ("contiguous", "zigzag")


@dataclasses.dataclass(frozen=True)
class Order:
    """An order of pieces over `devices`; what is asked of a device may be asked of a traced index too."""

    name: str
    devices: int

    @property
    def pieces(self) -> int:
        """Of one device."""
        return 2 if self.name == "zigzag" else 1

    @property
    def total(self) -> int:
        return self.pieces * self.devices

    def piece(self, device: Any, n: int) -> Any:
        """Which piece of the sequence the n-th one of a device is."""
        return device if n == 0 else self.total - 1 - device

    @property
    def stored(self) -> list[int]:
        """The pieces as they are stored, device after device."""
        return [self.piece(device, n) for device in range(self.devices) for n in range(self.pieces)]


def _reordered(x: Any, pieces: list[int], axis: int) -> jax.Array:
    axis = axis % x.ndim
    if x.shape[axis] % len(pieces):
        raise ValueError(f"the zig-zag needs a length that is a multiple of {len(pieces)}, got {x.shape[axis]} at axis {axis}.")
    split = jnp.reshape(x, (*x.shape[:axis], len(pieces), x.shape[axis] // len(pieces), *x.shape[axis + 1 :]))
    return jnp.reshape(jnp.take(split, jnp.asarray(pieces), axis=axis), x.shape)


def to_zigzag(x: Any, devices: int, axis: int = -2) -> jax.Array:
    """x with the pieces of `axis` in the order in which `devices` hold them; positions, ids and targets go the same way.

    Args:
        x: any array. devices: the size of the mesh axis. axis: the axis of the sequence, the length of BHLE arrays by default.

    Raises:
        ValueError: the length is no multiple of 2 * devices.

    Once a batch, before the first layer: every layer then works in that order. Source: torch.distributed.tensor.experimental's
    `context_parallel`, which shuffles its buffers in place; here it is a function of an array, and `from_zigzag` undoes it.

    >>> to_zigzag(jnp.arange(8), 2, axis=0).tolist(), to_zigzag(jnp.arange(8), 4, axis=0).tolist()
    ([0, 1, 6, 7, 2, 3, 4, 5], [0, 7, 1, 6, 2, 5, 3, 4])
    """
    return _reordered(x, Order("zigzag", devices).stored, axis)


def from_zigzag(x: Any, devices: int, axis: int = -2) -> jax.Array:
    """What `to_zigzag` was given.

    >>> from_zigzag(to_zigzag(jnp.arange(8), 2, axis=0), 2, axis=0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    stored = Order("zigzag", devices).stored
    return _reordered(x, [stored.index(piece) for piece in range(len(stored))], axis)
