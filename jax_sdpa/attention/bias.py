"""The mirror of `torch.nn.attention.bias`, and the structured masks that go wherever `attn_mask` goes."""

from __future__ import annotations

import dataclasses
import enum

from jax_sdpa.masks import And, Band, Dense, Index, KeyLengths, Mask, Packed, QueryLengths, SegmentIds, causal, sliding_window

__all__ = [
    "And",
    "Band",
    "CausalBias",
    "CausalVariant",
    "Dense",
    "KeyLengths",
    "Mask",
    "Packed",
    "QueryLengths",
    "SegmentIds",
    "causal",
    "causal_lower_right",
    "causal_upper_left",
    "sliding_window",
]


class CausalVariant(enum.IntEnum):
    """Where the triangle of a causal mask with L != S sits; for L == S the two are the same."""

    UPPER_LEFT = 1
    LOWER_RIGHT = 2


@dataclasses.dataclass(frozen=True)
class CausalBias(Mask):
    """A causal mask of given lengths: `keep = k <= q + offset`, offset 0 (upper left) or seq_len_kv - seq_len_q (lower right).

    Args:
        variant: a `CausalVariant`.
        seq_len_q, seq_len_kv: the lengths of the call; others raise ValueError (torch ignores them for the upper-left variant).

    Source: torch.nn.attention.bias.CausalBias, torch 2.13. Differs: no tensor subclass, never materialised by a fused backend,
    combines with other masks by `&`; rows without keys (lower right, L > S) give 0, without torch's warning.

    >>> CausalBias(CausalVariant.LOWER_RIGHT, 2, 4).materialise(2, 4).astype(int)
    Array([[1, 1, 1, 0],
           [1, 1, 1, 1]], dtype=int32)
    """

    variant: CausalVariant
    seq_len_q: int
    seq_len_kv: int

    def __post_init__(self) -> None:
        if not isinstance(self.variant, CausalVariant):
            raise TypeError(f"variant must be a CausalVariant, got {self.variant!r}.")

    @property
    def _band(self) -> Band:
        return causal(self.seq_len_kv - self.seq_len_q if self.variant is CausalVariant.LOWER_RIGHT else 0)

    def parts(self, L: Index, S: Index) -> tuple[Mask, ...]:
        if (self.seq_len_q, self.seq_len_kv) != (L, S):
            raise ValueError(
                f"CausalBias was made for lengths ({self.seq_len_q}, {self.seq_len_kv}), the call has L={L}, S={S}: make it with "
                f"causal_{self.variant.name.lower()}({L}, {S})."
            )
        return (self._band,)

    def keep(self, q_idx: Index, k_idx: Index) -> object:
        return self._band.keep(q_idx, k_idx)

    def seen_from(self, q0: Index, k0: Index) -> Band:
        return self._band.seen_from(q0, k0)

    def transposed(self) -> Band:
        return self._band.transposed()

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        return self._band.kv_range(q_lo, q_hi, L, S)

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        return self._band.full_range(q_lo, q_hi, L, S)


def causal_upper_left(seq_len_q: int, seq_len_kv: int) -> CausalBias:
    """The triangle that starts in the upper left corner: query q sees keys 0 to q, what `is_causal=True` means.

    >>> causal_upper_left(2, 4).materialise(2, 4).astype(int)
    Array([[1, 0, 0, 0],
           [1, 1, 0, 0]], dtype=int32)
    """
    return CausalBias(CausalVariant.UPPER_LEFT, seq_len_q, seq_len_kv)


def causal_lower_right(seq_len_q: int, seq_len_kv: int) -> CausalBias:
    """The triangle that ends in the lower right corner: the last query sees every key. What a KV cache needs.

    Prefill, chunked prefill and decode are one line each, with no L x S array anywhere:

    >>> import jax.numpy as jnp
    >>> from jax_sdpa import scaled_dot_product_attention as sdpa
    >>> cache = jnp.ones((1, 2, 12, 8))                                        # 12 keys so far
    >>> q = jnp.ones((1, 2, 12, 8))
    >>> sdpa(q, cache, cache, is_causal=True).shape                            # prefill: L = S = 12
    (1, 2, 12, 8)
    >>> chunk = jnp.ones((1, 2, 5, 8))                                         # chunked prefill: the last 5 of the 12
    >>> sdpa(chunk, cache, cache, attn_mask=causal_lower_right(5, 12)).shape
    (1, 2, 5, 8)
    >>> sdpa(chunk[:, :, :1], cache, cache).shape                              # decode: the one query sees every key
    (1, 2, 1, 8)
    """
    return CausalBias(CausalVariant.LOWER_RIGHT, seq_len_q, seq_len_kv)
