"""Which configuration a forward call gets. Measured on an H200, 2026-11-24 to 29, jax 0.11.2 (NOTES.md, "Hopper forward")."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.contracts import ForwardConfig
from pallas_kernels.visits import cdiv

SMS = 132  # of an H100 SXM and an H200

OF_TWO = (248, 56)
"""Registers of a warpgroup that computes and of one that loads: the most that ptxas gives one, and ample, since two may have
512. B1 H8 L1024 D128, both passes, H200, 2026-11-29: 47.9 us with (240, 24), which spilled 4 bytes, 47.6 so."""

THREE = ForwardConfig(warpgroups=3, registers=(160, 32), pinned=True)
"""D64: its accumulators leave room for a third warpgroup, which is more than what either overlap gives (558 to 436 TFLOP/s)."""


def forward_config(
    *, heads: int, query_len: int, key_len: int, head_dim: int, value_head_dim: int, group: int = 1, masked: bool = False,
    sloped: bool = False, cut_once: bool = False, seen: float | None = None, dense: bool = False, tiled: bool = False,
    drops: bool = False, bias_bytes: int = 0, keyed: bool = False, readers: tuple[int, bool] = (1, False),
) -> ForwardConfig:  # fmt: skip
    """The configuration for `heads` = B * Hq heads, `group` of them to a key/value head, of these lengths and head dims.

    masked: there is a mask; sloped: a causal one or a window, which cuts other keys off for each row; cut_once: of which only a
    walk's first tile needs the mask (`visits.cut_once`); seen: of how many keys a row tile visits the tiles, on average, all of
    them if not said; dense: a mask that is an array; tiled: and as large as the scores; drops: dropout; bias_bytes: of an
    element of a bias as large as the scores, 0 without one, readers: of its rows (`dense.readers`); keyed: there is a bias that
    has a number for each key.

    >>> forward_config(heads=512, query_len=512, key_len=512, head_dim=128, value_head_dim=128).row_tiles
    16
    """
    wide = max(head_dim, value_head_dim)
    seen = key_len if seen is None else seen
    steps = seen / (64 if wide > 128 else 128)
    brief = _short_rows(heads, query_len, key_len, wide, sloped, not (dense or drops or bias_bytes) and masked == sloped)
    if brief is not None:
        config = brief
    elif wide <= 64:
        config = _narrow(query_len, steps, masked, sloped, cut_once, drops, bias_bytes > 0, keyed)
    elif wide <= 128:
        config = _middle(steps, sloped, cut_once, dense, drops, bias_bytes > 0, keyed)
    else:
        # every tile of a random bool mask masked 697 TFLOP/s, by a branch 675; D128 549 and 646, D64 417 and 448
        config = ForwardConfig(block_k=64, masks_all=dense)
    if not config.alone:  # one tile: 213 TFLOP/s, with chains 183 (L 128, D64)
        chains = _chains(wide, steps, group, masked, sloped, cut_once, dense, drops, bias_bytes, keyed)
        config = dataclasses.replace(config, chains=chains)
    config = spread_out(config, heads, query_len, seen / key_len if sloped else None, NARROW if wide <= 64 else WIDE)
    resident = 1 if config.alone else cdiv(heads * cdiv(query_len, config.rows), SMS)
    row_tiles = min(resident, _most_row_tiles(resident, key_len, seen, steps, wide, sloped, tiled, drops))
    # walks of one tile, D64, L 128: 6.2 us, the next queries in memory as well 6.7; with four query heads to a key head 17.4, 18.6
    queries = 2 if row_tiles > 1 and (steps > 1 or wide > 64) else 1
    config = dataclasses.replace(config, row_tiles=row_tiles, queries=queries)
    config = fitted(config, LESS, lambda config: shared_bytes(config, head_dim, value_head_dim, bias_bytes, keyed))
    read = 2 * key_len * (head_dim + value_head_dim) // group
    if sloped and config.row_tiles == 1:
        config = dataclasses.replace(config, together=side_by_side(cdiv(query_len, config.rows), read))
    elif sloped:
        # 28 heads on 4, L 4096: 634 TFLOP/s, one after the other 571, single row tiles 618; 64 heads of their own 641 and 651
        config = dataclasses.replace(config, together=heads if heads * read <= IN_CACHE else 1)
    return beside_readers(config, readers, read)


IN_CACHE = 1 << 24
"""Bytes that heads side by side may read at one time, again and again: from the L2, which holds 50 MB, a byte perhaps twice."""


def side_by_side(row_tiles: int, read: int) -> int:
    """How many heads of so many row tiles, which read so many bytes each at one time, take turns where row tiles differ.

    Programs of one row tile each start in their order, each where an SM has become free, so the last ones should be light
    ones: FlashAttention-4's longest-first schedule. There should be two rounds of programs to choose from; heads that run
    at one time anyway cost nothing. H200, 2026-11-27, causal, fused backward at D128, one head after the other / so: B4
    L4096 513 / 550 TFLOP/s, 32 heads on 8 at L8192 500 / 600, 28 heads on 4 at L4096 428 / 514; with 64 heads side by side
    at L4096 421, since they do not fit the cache. Heads that are left over join the last ones.
    """
    least, most = max(1, SMS // row_tiles), max(1, 2 * SMS // row_tiles)
    return max(least, min(most, IN_CACHE // max(1, read)))


def beside_readers(config: Any, readers: tuple[int, bool], read: int) -> Any:
    """The configuration with heads side by side that read the same rows of a bias, as many as may read so many bytes beside it.

    One of float32 that a batch of 4 shares, B4 L4096, H200, 2026-11-29: D64 254 to 327 TFLOP/s, D128 411 to 461, D256 534 to 563;
    one batch entry after the other reads it anew from memory, four times.
    """
    number, across = readers
    if number == 1:
        return config
    return dataclasses.replace(config, together=max(config.together, min(number, IN_CACHE // max(1, read))), across=across)


def fitted(config: Any, less: Sequence[dict[str, Any]], needs: Callable[[Any], int]) -> Any:
    """The configuration, with as many of the changes `less` as it takes until what it `needs` fits the shared memory."""
    for change in less:
        if needs(config) <= SHARED_MEMORY:
            break
        config = dataclasses.replace(config, **change)
    return config


SHARED_MEMORY = 232448 - 2048
"""Bytes of a program: 227 KB (CUDA C++ programming guide, compute capability 9.0) less barriers, lse and alignment."""

LESS: tuple[dict[str, Any], ...] = (
    {"queries": 1},
    {"stages": 2},
    {"row_tiles": 1},
    {"bias_stages": 1},
    {"block_k": 64},
    {"warpgroups": 1, "registers": OF_TWO},
)
"""What a configuration gives up, in this order, until it fits the shared memory: 128 keys with one tile of a float32 bias in flight
are faster than 64 keys with two (402 to 372 TFLOP/s)."""


def whole(size: int) -> int:
    """Mosaic begins each array in shared memory at a multiple of 1024 bytes."""
    return cdiv(size, 1024) * 1024


def shared_bytes(config: ForwardConfig, head_dim: int, value_head_dim: int, bias_bytes: int, keyed: bool = False) -> int:
    """Of a program's queries, keys, values, results, bias tiles and pins; head dims as the kernel pads them."""
    E, Ev = (cdiv(dim, 16) * 16 for dim in (head_dim, value_head_dim))
    queries = config.rows * E * config.queries
    results = config.rows * config.out_columns(E, Ev) if config.own_out(E, Ev) else 0
    keys = config.stages * config.block_k * (E + Ev)
    pins = 4 * config.rows * math.prod(config.sums) if config.pinned or config.pinned_once else 0
    biases = config.bias_stages * config.block_k * (4 if keyed else config.rows * bias_bytes)
    return 2 * (queries + results + keys) + whole(biases) + pins


def _short_rows(heads: int, query_len: int, key_len: int, wide: int, sloped: bool, plain: bool) -> ForwardConfig | None:
    """Where a row of keys is a few tiles there is nothing to hide loads under but other programs: then several share an SM, each
    with all of its tiles under way at once. plain: neither a mask that is no slope, nor dropout, nor a bias. Slopes were timed as
    causal masks; segments count as one.

    H200, 2026-11-29, us, one loading warpgroup for two or three that compute / so: 64 keys of B64 H16 D64 16.6 / 6.6, D128 23.7 /
    18.7, D256 38.0 / 34.3; 128 keys of B32 H8 D64 6.2 / 5.0 (two warpgroups 5.5), of 32 heads on 8 17.1 / 15.3 (19.1), D128 9.4 /
    8.0 (one 9.9); 192 keys, D64, 12.4 / 10.7. Causal in tiles of 64, D64, L 128 6.7 / 5.0, L 192 11.7 / 10.5, L 256 14.7 / 12.2, L
    384 22.6 / 30.4; D128, L 128, 15.4 / 16.8. With other masks or dropout nothing is gained at D64, and 20 % lost at D128. But
    where all programs run at one time it is ahead with every mask, dropout and bias: B4 H12, 128 keys, D64 4.3 to 7.4 / 3.0 to 6.1,
    D128 5.2 to 8.9 / 3.8 to 7.0; B2 H8 D256 6.9 / 5.0.
    """
    programs = heads * cdiv(query_len, 64)
    if key_len <= 64:
        return _alone(key_len, 1, 64)
    if key_len <= 128 and programs <= (2 * SMS if wide <= 128 else SMS):
        return _alone(key_len, 1, 128 if wide <= 128 else 64)
    if not plain or wide > 128:
        return None
    if sloped:  # fewer programs than SMs: one warpgroup and one that loads, L 256 3.9 us, so 5.1
        return _alone(key_len, 2, 64) if wide <= 64 and key_len <= 256 and programs > SMS else None
    if key_len <= 128:
        return _alone(key_len, 1 if wide <= 64 or query_len <= 64 else 2, 128)
    return _alone(key_len, 1, 64) if wide <= 64 and key_len <= 192 else None


def _alone(key_len: int, warpgroups: int, block_k: int) -> ForwardConfig:
    tiles = cdiv(key_len, block_k)
    return ForwardConfig(alone=True, warpgroups=warpgroups, block_k=block_k, stages=tiles, bias_stages=tiles)


NARROW, WIDE = {1: 0.56, 2: 0.84, 3: 1.0}, {1: 0.75, 2: 1.0}
"""How long a program of so many warpgroups takes beside the widest one (`spread_out`): of the forward up to D64; beyond, and of the
backward."""


def spread_out(config: Any, heads: int, length: int, slope: float | None, takes: dict[int, float]) -> Any:
    """Of a grid of at most two rounds of programs: the configuration with as many warpgroups as are done with it first.

    heads, length: of which a program takes `rows`; slope: how much of its rows is visited on average, if they differ.

    H200, 2026-11-29, us, three / two / one warpgroup of 64 rows a program, D64: B1 H12 L512 10.0 / 8.2 / 5.5, B1 H8 L1024
    15.5 / 13.1 / 8.9, B1 H16 L1024 16.2 / 13.7 / 17.0, causal 16.2 / 14.2 / 12.3, B2 H16 L1024 30.3 / 26.4 / 32.9, causal
    19.7 / 17.7 / 23.2, B1 H8 L2048 27.4 / 24.8 / 29.9, causal 26.5 / 24.6 / 18.8. Two / one, D128: B1 H12 L512 10.2 / 7.2, B1
    H8 L1024 17.7 / 11.7, L2048 28.5 / 39.6, causal 27.1 / 24.8; D256: L512 14.1 / 10.2, L1024 24.1 / 17.8, B1 H16 L1024 26.3
    / 34.7, causal 25.9 / 24.7.
    """
    if config.alone or heads * cdiv(length, config.rows) > 2 * SMS:
        return config

    def done(warpgroups: int) -> float:
        programs = heads * cdiv(length, config.block_q * warpgroups)
        return takes[warpgroups] * (cdiv(programs, SMS) if slope is None else max(1.0, slope * programs / SMS))

    chosen = min(range(config.warpgroups, 0, -1), key=done)
    if chosen == config.warpgroups:
        return config
    return dataclasses.replace(config, warpgroups=chosen, registers=OF_TWO if chosen == 1 else (240, 24), pinned=False)


def _narrow(
    query_len: int, steps: float, masked: bool, sloped: bool, cut_once: bool, drops: bool, biased: bool, keyed: bool
) -> ForwardConfig:  # fmt: skip
    """D64. Three warpgroups have 160 registers a thread: dropout's words and a mask together spill there; and 192 rows are too many
    for a length that is far from a multiple of them."""
    if (masked and drops) or cdiv(query_len, THREE.rows) * THREE.rows > 1.25 * query_len:
        return ForwardConfig(pinned=sloped and cut_once and drops)  # causal dropout 356 TFLOP/s, not pinned 328, three 228
    # more tiles in flight where items change often, or differ: 286 to 274 TFLOP/s (causal, L 512); one item a program 515 to 544
    # a bias, pinned or not: bfloat16 389 and 397 TFLOP/s, causal 353 and 359, float16 374 and 380, float32 336 and 335; of keys 439
    # and 455, causal 402 and 415, but at L 512 342 and 336
    stages = 4 if (sloped and steps <= 32) or steps <= 6 else 2
    return dataclasses.replace(THREE, stages=stages, pinned=not (biased or (keyed and not drops and (sloped or steps > 6))))


def _middle(
    steps: float, sloped: bool, cut_once: bool, dense: bool, drops: bool, biased: bool, keyed: bool
) -> ForwardConfig:  # fmt: skip
    """D128. Queries in registers: without a mask 734 TFLOP/s, else 718; with dropout 576, else 524, causal 547 and 551; beside a
    slope's coordinates in the loop they spill.

    Where only the first tile of a walk is masked, both warpgroups come to wait for products, and to take exponentials, at one time
    (NOTES.md, "Two gaits"), unless `pinned`: key lengths 703 to 648, causal L 4096 657 to 563. Without a mask, or with more in the
    loop, they take turns by themselves, and pinned loses: dropout 556 to 576. Walks of two or three tiles are better masked in the
    loop: causal L 512 388 to 370. All on an H200, 2026-11-24 to 27. But beside a bias they spill there, us, in the loop / in
    branches / `masks_all` as well: causal, L 256, bfloat16, 66.0 / 62.2 / 61.8, L 512 80.6 / 79.7 / 77.1; of keys 45.0 / 43.8 /
    45.3, 58.6 / 58.7 / 59.1 (2026-11-30); with dropout it is the branches that spill.
    """
    once = cut_once and steps > 3 and not (drops or biased)
    return ForwardConfig(
        q_registers=once or not (sloped or keyed), pinned=once or (keyed and not (sloped or drops)),
        pinned_once=dense and not (drops or biased), spread=steps <= 3 and (drops or not (biased or keyed)),
        masks_all=biased and sloped and steps <= 3 and not drops,
    )  # fmt: skip


def _chains(
    wide: int, steps: float, group: int, masked: bool, sloped: bool, cut_once: bool, dense: bool, drops: bool, bias_bytes: int,
    keyed: bool,
) -> int:  # fmt: skip
    """In how many chains the exponentials of a tile are added up (`ForwardConfig.chains`).

    What is saved is 10 instructions of 450, four of them exchanges; what decides is in which order of a loop warpgroups take
    turns (NOTES.md, "Sums in chains"). H200, 2026-11-29, TFLOP/s, in 0 / 1 / 2 / 4 / 8. D128, L 16384 730 / 738 / 738 / 738 /
    690, L 2048 686 / 694 / 691 / 700 / 658, L 512 576 / 566 / 583 / 549 / 566; causal 714 / 717 / 716 / 718 / 719, 590 / 594
    / 594 / 600 / 577, 377 / 394 / 380 / 391 / 390, 28 heads on 4, L 4096, 641 / 641 / 616 / 610 / 609; key lengths 696 / 716
    / 713 / 713 / 717, padding 696 / 706 / 703 / 698 / 702, segments 507 / 515 / 502 / 494 / 490, but a window 533 / 520 / 522
    / 528 / 481; a bias 544 / 550 / 550 / 550 / 542, bool masks 642 / 640 / 638 / 639 / 635 and, of keys, 666 / 667 / 661 /
    666 / 660; one warpgroup, B1 H8 L1024, 366 / 364 / 367 / 369 / 365; dropout 575 / 579 (4 bytes spilled) / 563 / 573 / 570.
    D64, L 2048 526 / 520 / 522 / 526 / 488, causal 441 / 447 / 445 / 446 / 456, L 16384 539 / 553 / 543 / 539 / 549; a random
    bool mask 457 / 461 / 467 / 466 / 443; key lengths 530 / 543 / 538 / 537 / 504. D192 726 / 740 / 731 / 735 / 734. D256 793
    / 769 / 772 / 778 / 778; a bias (2026-11-30; also below) 626 / 646 / 641 / 640 / -, float32 555 / 573 / 595 / 583 / -, D64
    376 / 397 / 386 / 382 / -, causal 337 / 359 / 343 / 344 / -, float32 338 / 335 / 339 / 334 / -, float16 363 / 380 / 376 /
    370 / -; of keys, D64, 449 / 442 / 450 / 455, L 2048 420 / 415 / 419 / 428, causal 383 / 415 / 395 / 405, L 512, pinned, 326
    / 342 / 335 / 333, D128, pinned, 611 / 629 / 625 / 618, L 2048 592 / 605 / 603 / 590, L 512 482 / 492 / 479 / 484, causal
    577 / 590 / 591 / 546, D256 704 / 710 / 700, causal 630 / 644 / 646 / 635; dropout 654 / 686 / 693 / 681 / 680.
    """
    if keyed and not drops:
        return 4 if wide <= 64 and steps > 6 and not sloped else 1
    if wide <= 64:
        if drops or bias_bytes or not masked:
            return 1 if bias_bytes and not drops else 0
        return (8 if cut_once else 4) if sloped else 2 if dense else 1  # a window 364 / 368 / - / 372 / 355
    if wide > 128:
        return 1 if wide <= 192 or (bias_bytes == 2 and not drops) else 2 if bias_bytes or (drops and not sloped) else 0
    if not (masked or drops or bias_bytes):
        return 2 if steps <= 4 else 4 if group == 1 else 1
    if not sloped:
        return 0 if drops else 1
    if not (cut_once or drops):
        return 0
    return 4 if group == 1 and steps > 3 and not (drops or bias_bytes) else 1


def _most_row_tiles(
    resident: int, key_len: int, seen: float, steps: float, wide: int, sloped: bool, tiled: bool, drops: bool
) -> int:  # fmt: skip
    """How many row tiles a program takes at most: all that one SM gets, as a rule, so that what lies between two of them is hidden.

    D64 at L 2048: 522 to 483 TFLOP/s, causal 434 to 349; D256 762 to 737, causal 631 to 556; a dense mask, D128 603, two at a
    time 592, D256 644 and one 635. Not so where a static share is uneven (D64 causal, L 16384: 429, two at a time 511, one
    544), and beside dropout (D64 359 to 400). Nor of two: B2 H16 L1024 D128 34.4 us, single ones 33.7, B1 H16 L2048 59.6 and
    57.8, causal, D64, B2 H16 L1024 21.6 and 19.7; but causal, D128, 20.3 and 23.0.
    """
    if (sloped and seen > 4096) or (resident == 2 and key_len >= 1024 and wide <= (64 if sloped else 128)):
        return 1
    if not (sloped or tiled) and drops and steps > 6 and wide != 128:
        return 1
    return 2**31
