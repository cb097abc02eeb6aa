"""What a kernel is given: its configuration, checked, and the questions that it asks of a mask.

A mask is any frozen pytree with the methods of `Mask`. Its arrays come with a leading dim of 1 or B and hold one number per batch
entry, or an id for each query or key; a kernel program asks a mask that holds what its own tile needs of them (`local`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax

from pallas_kernels.online_softmax import EIGHT

SCALES_OF_PAGE = 32
"""A decode reads the scales of a page of 8-bit keys where they lie if it has so many: TMA wants 128 bytes of shared memory each."""


class Mask(Protocol):
    """Which keys a query may see, as integer arithmetic on positions that runs inside a kernel.

    Without arrays its ranges of ints are ints: what they say is known while tracing (`visits.cut_once`).
    """

    @property
    def is_prefix(self) -> bool:
        """Whether every query keeps the same keys, and these are the first ones."""
        ...

    def keep(self, q_idx: Any, k_idx: Any) -> Any:
        """True where query q_idx takes key k_idx; the two broadcast together."""
        ...

    def kv_range(self, q_lo: Any, q_hi: Any, L: int, S: int) -> tuple[Any, Any]:
        """[lo, hi): outside of it no query of [q_lo, q_hi) keeps any key."""
        ...

    def full_range(self, q_lo: Any, q_hi: Any, L: int, S: int) -> tuple[Any, Any]:
        """[lo, hi): inside of it every query of [q_lo, q_hi) keeps every key."""
        ...

    def key_valid(self, L: int, S: int) -> Any:
        """(B|1, S) or (S,) bool: the keys that some query of the call may see; None where that is all of them."""
        ...

    def padded(self, more_q: int, more_k: int) -> Any:
        """The mask with ids for so many more queries and keys."""
        ...

    def moved(self, by: Any) -> Any:
        """The same mask for positions of queries and keys that both count from `by`."""
        ...

    def transposed(self) -> Any:
        """The mask with queries and keys exchanged: what a block of keys asks."""
        ...

    def local(self, number: Callable[[Any], Any], by_query: Callable[[Any], Any], by_key: Callable[[Any], Any]) -> Any:
        """The mask of one tile: each array per batch entry, per query, per key replaced by what these make of it."""
        ...


def has_ids(mask: Any) -> bool:
    """Whether a mask, or None, has an id for each position: what its tiles are then is not known to a program by itself."""
    return any(len(array.shape) == 2 for array in jax.tree.leaves(mask))


def cuts_few(mask: Any, keep: Any) -> bool:
    """Whether a mask and a dense one, each perhaps None, are key lengths alone, which cut one tile of a row's keys at most."""
    return keep is None and mask is not None and mask.is_prefix


@dataclasses.dataclass(frozen=True)
class Ids:
    """A tile's ids, (rows, columns), where a mask indexes an array of ids by position: that was done when they were loaded."""

    tile: Any
    ndim = 1

    def __getitem__(self, _: Any) -> Any:
        return self.tile


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How a forward kernel cuts its work.

    block_q: query rows of one warpgroup (64: one wgmma). block_k: keys of a tile. stages: tiles of K and of V in flight.
    warpgroups: that compute; one more loads. registers: a thread of (a computing, the loading) warpgroup. row_tiles: of one
    program, one after another: K and V of the next one are on their way while the last one is finished. together: heads whose
    row tiles take turns, heaviest first. across: these are one head of several batch entries. queries: row tiles whose queries
    are in memory: with 2, the next one's arrive meanwhile as well. q_registers: the queries of the current row tile are in
    registers, which spares shared memory a third of a product's reads. bias_stages: tiles of a bias, or its numbers for a
    tile's keys, in flight. pinned: a warpgroup waits for the last PV behind all of its softmax (else where the compiler likes
    it, early). pinned_once: so under a dense mask that cuts no more than one tile of a walk. spread: a mask that is no prefix
    stands in the loop over key tiles even where only the first one needs it. masks_all: every tile is masked, without a branch.
    alone: no warpgroup loads, the first one asks for all tiles before it computes, so the ring has as many stages as there are;
    registers are then what the assembler needs, and several programs share an SM. chains: sums of a row are kept apart
    (`online_softmax.update`), a tile's in so many chains; 0: they are added up in each tile.
    """

    block_q: int = 64
    block_k: int = 128
    stages: int = 2
    warpgroups: int = 2
    registers: tuple[int, int] = (240, 24)
    row_tiles: int = 1
    together: int = 1
    across: bool = False
    queries: int = 1
    bias_stages: int = 2
    pinned: bool = False
    pinned_once: bool = False
    spread: bool = False
    q_registers: bool = False
    masks_all: bool = False
    alone: bool = False
    chains: int = 0

    def __post_init__(self) -> None:
        if self.block_q != 64:
            raise ValueError(f"block_q must be 64, the rows of one wgmma, got {self.block_q}.")
        if self.block_k % 64 or not 64 <= self.block_k <= 256:
            raise ValueError(f"block_k must be 64, 128, 192 or 256, got {self.block_k}.")
        if self.stages < (least := 1 if self.alone else 2):
            raise ValueError(f"stages must be at least {least}, got {self.stages}: one tile computes while another loads.")
        if self.alone and self.row_tiles > 1:
            raise ValueError(f"a program without a loading warpgroup has one row tile, got row_tiles={self.row_tiles}.")
        if self.row_tiles < 1:
            raise ValueError(f"row_tiles must be at least 1, got {self.row_tiles}.")
        if self.together < 1:
            raise ValueError(f"together must be at least 1, got {self.together}.")
        if self.chains not in (0, 1, 2, 4, 8):
            raise ValueError(f"chains must be 0, 1, 2, 4 or 8, got {self.chains}.")
        if self.queries not in (1, 2):
            raise ValueError(f"queries must be 1 or 2, got {self.queries}.")
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"warpgroups must be 1, 2 or 3, got {self.warpgroups}.")
        if self.alone:
            return
        threads = 128 * (self.warpgroups + 1)
        at_launch = 65536 // threads // 8 * 8  # what ptxas gives a thread: more than these together and warpgroups wait for ever
        if self.warpgroups * self.registers[0] + self.registers[1] > at_launch * (self.warpgroups + 1):
            wanted = f"{self.warpgroups} x {self.registers[0]} + {self.registers[1]}"
            most = at_launch * (self.warpgroups + 1)
            raise ValueError(
                f"registers must be at most {most} over all warpgroups, what a program of so many gets; {wanted} are more."
            )

    @property
    def sums(self) -> tuple[int, ...]:
        """What a row's sum of exponentials has for a shape: none, or those that are kept apart."""
        return (EIGHT,) if self.chains else ()

    @property
    def rows(self) -> int:
        """Query rows of one program."""
        return self.block_q * self.warpgroups

    def own_out(self, head_dim: int, value_head_dim: int) -> bool:
        """Whether results leave from memory of their own: else from that of their queries, which have been read by then."""
        return head_dim != value_head_dim or (self.row_tiles > 1 and self.queries == 1)

    def out_columns(self, head_dim: int, value_head_dim: int) -> int:
        """Columns of the results that leave at a time: memory of their own is scarce beside head dims of 256."""
        return 128 if self.own_out(head_dim, value_head_dim) and value_head_dim % 128 == 0 else value_head_dim


@dataclasses.dataclass(frozen=True)
class DecodeConfig(ForwardConfig):
    """How a decode kernel cuts its work: as a forward kernel, whose rows are a group's heads times a few queries. programs: that
    share the key tiles, one or more for each SM.
    """

    programs: int = 132

    def own_out(self, head_dim: int, value_head_dim: int) -> bool:
        return True

    def out_columns(self, head_dim: int, value_head_dim: int) -> int:
        """Of the float32 results, at most 64 at a time, so that the ring gets the memory."""
        return math.gcd(value_head_dim, 64)


@dataclasses.dataclass(frozen=True)
class WalkConfig(ForwardConfig):
    """How a backward kernel cuts its work: as a forward kernel, rows (block_q) stay, tiles of columns (block_k) stream past.

    brief: tiles in memory of what only one step needs, V or dO; None: stages. ahead: tiles of Q in memory beyond `stages` (dk,
    dv). plain: dq is finished within its step, nothing is in flight under ds (dkv), for want of registers: other warpgroups fill
    the gaps. early: dq's steps are in dk's order, the next scores beside this step's product. half: p waits in half precision for
    the next step (dk, dv, early dq). split: programs among which the query heads of a group are divided; each has a dk and
    dv of its own, which XLA adds up (dk, dv). roles: two warpgroups share the same block_q keys, one makes dv and the other dk
    (`hopper_backward_roles`). buffers: tiles of p on their way from one role to the other; where a softcap's
    slope is held it takes the second one.
    """

    block_k: int = 64
    brief: int | None = None
    ahead: int = 1
    plain: bool = False
    early: bool = False
    half: bool = False
    split: int = 1
    roles: bool = False
    buffers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffers not in (1, 2):
            raise ValueError(f"buffers must be 1 or 2, got {self}.")
        if self.roles and (self.warpgroups != 2 or self.alone):
            raise ValueError(f"roles are two, beside one that loads, so warpgroups must be 2, got {self}.")

    @property
    def rows(self) -> int:
        return self.block_q if self.roles else super().rows

    @property
    def brief_stages(self) -> int:
        return self.stages if self.brief is None else self.brief


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """dq: rows are queries, columns keys. dkv: rows are keys, columns queries; None where dk and dv have to be made one after the
    other, by dk and dv, because both sums together are more than the registers hold. fused: of one kernel for all three, rows and
    columns as dkv's; None for the pair. dkv in roles is for calls whose keys and values are equally wide (`keys_together`)."""

    dq: WalkConfig
    dkv: WalkConfig | None
    dk: WalkConfig
    dv: WalkConfig
    fused: WalkConfig | None = None

    def __post_init__(self) -> None:
        if self.fused is not None and self.fused.alone:
            raise ValueError("a fused kernel's loading warpgroup makes dq as well, so it cannot be alone.")

    def keys_together(self, head_dim: int, value_head_dim: int) -> WalkConfig | None:
        """How dk and dv are made by one kernel, if they are. In roles tiles of Q and of dO take turns in the same memory."""
        own = self.dkv
        return None if own is not None and own.roles and head_dim != value_head_dim else own

    def can_fuse(self, head_dim: int) -> bool:
        """Whether dq can be made in pieces of 64 columns: narrower keys have another swizzle than ds, which their product does not
        take."""
        return self.fused is not None and head_dim % 64 == 0


@dataclasses.dataclass(frozen=True)
class ForwardShape:
    """The static facts of a call: what the kernel is compiled for."""

    batch: int
    q_heads: int
    kv_heads: int
    query_len: int
    key_len: int
    head_dim: int
    value_head_dim: int
    dtype: Any
    layout: str  # 'BHLE' or 'BLHE'
    scale: float | None  # None: an operand
    softcap: float | None = None
    dropout_p: float = 0.0
    sinks: bool = False

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads
