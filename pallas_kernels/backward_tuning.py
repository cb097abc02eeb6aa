"""Which configuration a backward call gets. Measured on an H200 and an H100, 2026-11-25 to 30 (NOTES.md, "Hopper backward").

Programs take all the row tiles that one SM gets, one after another, where what lies between two of them is long beside them,
and rows differ or are short; else one, heads side by side (`tuning.side_by_side`). One / all of them, microseconds on an H100:
D128 L512 dq 202 / 184, dkv 257 / 247; causal 154 / 135, 192 / 167; causal L2048 364 / 325, 487 / 451; causal L4096 (28 heads on
4) 303 / 285, 497 / 422; causal L16384 2236 / 2196, 3085 / 3233; L2048 547 / 593, 774 / 844. D64 causal L512 229 / 168, 261 /
200, causal L2048 493 / 449.

The fused kernel adds to dq in any order, so it is chosen only where it is about 10 % faster than the pair, or more, or where
the pair is behind cuDNN (28 heads on 4, L32768). Pair / fused, TFLOP/s of the backward alone on an H200, 2026-11-27: D128
L16384 568 / 658, causal 582 / 623; 32 heads on 8, causal, L8192 535 / 602; L4096 550 / 634, causal 553 / 550; L2048 543 / 578,
causal 493 / 466; 28 heads on 4, causal, L32768 511 / 567, L4096 490 / 514. D64 L16384 409 / 525, causal 407 / 535; L2048 366 /
464, causal 366 / 397. Beside a softcap, both passes, us, 2026-11-30: D128 L4096 4965 / 3963, causal 2560 / 2115; L2048 2591 /
2119, causal 1376 / 1217; L512 740 / 714, causal 492 / 554; a window of 1000 1534 / 1329; D64 L4096 7770 / 6600, causal 4585 /
3422, L2048 causal 2419 / 1903, L512 1127 / 1062.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.contracts import BackwardConfig, WalkConfig
from pallas_kernels.tuning import whole
from pallas_kernels.visits import cdiv


def backward_config(
    *, heads: int, group: int, query_len: int, key_len: int, head_dim: int, value_head_dim: int, masked: bool = False,
    dense: bool = False, tiled: bool = False, sloped: bool = False, cut_once: bool = False, seen: float | None = None,
    prefix: bool = False, drops: bool = False, biased: bool = False, bias_bytes: int = 0, readers: tuple[int, bool] = (1, False),
    capped: bool = False, summed: bool = False, deterministic: bool = True,
) -> BackwardConfig:  # fmt: skip
    """The configuration for `heads` = B * Hq query heads, `group` of them to a key/value head, of these lengths and head dims.

    masked, dense, tiled, sloped, cut_once, seen, drops, bias_bytes, readers: as `tuning.forward_config`'s, cut_once of walks of
    queries too; prefix: every query keeps the same first keys; biased: there is a bias of any size. capped: there is a softcap.
    summed: ds is summed over the queries, the gradient of a bias of keys; p in half precision would take digits from it that dk,
    whose ds is rounded anyway, does not have (D128 causal, 256 keys: 3.7 times the error of float32 p, which has the honest one's).
    deterministic: the same bits each time, so not the fused kernel.

    >>> backward_config(heads=16, group=1, query_len=4096, key_len=4096, head_dim=256, value_head_dim=256).dkv.roles
    True
    """
    wide = max(head_dim, value_head_dim)
    seen = key_len if seen is None else seen
    may_fuse = not deterministic
    if wide <= 64:
        many = heads // group * cdiv(key_len, 128) > tuning.SMS // 2  # B1 H8 L1024 35.8 us, fused 38.7; B1 H16 52.8, 45.8
        fuses = may_fuse and head_dim > 48 and min(query_len, seen) >= 1024 and many
        own = _narrow(fuses, seen, masked, cut_once, prefix, drops, biased, bias_bytes > 0, capped, summed)
    elif wide <= 128:
        # sloped: from L 8192 on (7424, to be exact), where 32 heads on 8 have 602 for the pair's 535; L 4096 550 for 553; capped:
        # from causal L 2048 on
        least = 1024 if capped else 3584 if sloped else 2048
        fuses = may_fuse and not drops and head_dim > 112 and min(query_len, seen) >= least
        split = _shared_out(WalkConfig(), heads // group, key_len, group).split
        own = _middle(fuses, seen, split, group, masked, dense, tiled, sloped, cut_once, drops, capped, summed)
    else:
        own = _wide(wide, masked and (dense or not sloped), capped, summed)
    own = {name: one if name == "dq" else one and _shared_out(one, heads // group, key_len, group) for name, one in own.items()}
    own = _short_rows(own, heads, group, query_len, key_len, wide, masked or drops or biased, bias_bytes > 0)
    for name, one in own.items():
        if one is not None and not (one.roles or name == "fused"):
            parts, length = (heads, query_len) if name == "dq" else (heads // group * one.split, key_len)
            own[name] = tuning.spread_out(one, parts, length, seen / key_len if sloped else None, tuning.WIDE)
    tiles = {name: cdiv(query_len if name == "dq" else key_len, one.rows) for name, one in own.items() if one}
    for name, one in own.items():
        if one is None or name == "fused" or one.alone:
            continue
        items = tiles[name] * (heads if name == "dq" else heads // group * one.split)
        short = SHORT if name == "dq" or wide <= 64 else SHORT // 2
        if seen <= 512 or (sloped and seen <= short and items >= MANY):
            own[name] = dataclasses.replace(one, row_tiles=cdiv(items, tuning.SMS))
    dims = {
        "head_dim": head_dim, "value_head_dim": value_head_dim, "drops": drops, "capped": capped, "biased": biased,
        "bias_bytes": bias_bytes,
    }  # fmt: skip
    found = {name: one and fitted(name, one, summed=summed, **dims) for name, one in own.items()}
    for name, one in found.items():
        if one is None:
            continue
        row = 2 * (head_dim + value_head_dim)
        read = row * key_len // group if name == "dq" else row * query_len
        if sloped and one.row_tiles == 1:
            one = dataclasses.replace(one, together=tuning.side_by_side(tiles[name], read))
        found[name] = tuning.beside_readers(one, readers, read)
    return BackwardConfig(**found)  # type: ignore[arg-type]


Kernels = dict[str, WalkConfig | None]
"""'dq', 'dkv', 'dk', 'dv' and 'fused': `BackwardConfig`'s fields."""


def _narrow(
    fuses: bool, seen: float, masked: bool, cut_once: bool, prefix: bool, drops: bool, biased: bool, tiled_bias: bool, capped: bool,
    summed: bool,
) -> Kernels:  # fmt: skip
    """D64. Beside the words of dropout and a mask 128 keys spill, and 128 queries serialise the products (C7512)."""
    dv = WalkConfig() if masked and drops else WalkConfig(block_k=128)
    # L 16384: 6282 us, not early 6543; dq and dkv, causal, 6750, 7115; L 2048 979, 1009; L 512 354, 347; both passes, lengths,
    # L 4096 4042, 4151, L 512 738, 753, and 24 bytes spilled
    early = not drops and ((not masked and not (biased and seen <= 512)) or prefix or (cut_once and seen > 512))
    dq = dataclasses.replace(dv, early=early)
    # causal, L 16384: 128 queries a tile 3870 us, 64 and float32 p 4417; without a mask 7354 and 7148. Beside a softcap 128 spill:
    # both passes, causal, L 4096, 4297 and 4585 us, but fused 3422; a window of 1000 at L 2048 2659 and 2478
    dkv = WalkConfig(block_k=128, half=True, masks_all=True) if masked and not (drops or capped or summed) else WalkConfig()
    if tiled_bias:
        dkv = dataclasses.replace(dkv, registers=ROOM)
    # L 16384: 10380 us, p in half precision 12101, 128 queries and half 13576
    return {"dq": dq, "dkv": dkv, "dk": dkv, "dv": dv, "fused": WalkConfig(**FUSED) if fuses else None}


def _middle(
    fuses: bool, seen: float, split: int, group: int, masked: bool, dense: bool, tiled: bool, sloped: bool, cut_once: bool,
    drops: bool, capped: bool, summed: bool,
) -> Kernels:  # fmt: skip
    """D128. split: of how many programs each makes the gradients of a share of a group's heads.

    Pair, p in float32 / in half precision, us: L 2048 1263 / 1294, causal 699 / 722, L 16384 9737 / 9677, causal 4808 / 4958,
    dropout 3143 / 3559, causal 1530 / 1716; both passes, TFLOP/s: bias 448 / 421, segments 291 / 283, but a window of 1024 389 /
    406. Beside a dense mask (545 / 544), or unmasked at L 512 (398 / 396 us), p in float32 spills. Nor where a program has key
    lengths (L 4096 1402 / 1384 us, L 2048 811 / 734), or several heads of a group in more than two shares: 28 on 4 in 4 shares
    889 / 793 us, causal 438 / 393; in 2 shares, 32 on 8, 700 / 732, causal 379 / 428, in one, causal, L 8192, 2472 / 2565. Beside
    a softcap 2048 / 2157 us, causal 1048 / 1112.
    """
    dq = WalkConfig(stages=3, registers=ROOM)  # L 16384: 4233 us, two stages 5506, two of 128 keys 6145
    often = dense or (sloped and not cut_once) or (masked and not sloped) or 2 < split < group
    # beside a softcap p in float32, of which the slope is made
    half = not summed and ((often and not capped) or (not masked and not drops and seen <= 512))
    # several heads a program, one after another, keep the slope in the loop: as a branch it spills 24 to 64 bytes of float32 p
    dkv = WalkConfig(half=half, masks_all=sloped and not half and (split < group or (capped and not cut_once)))
    # dropout beside a mask spills 4 to 152 bytes else. Both passes, us, before / so: lengths 4092 / 4146, a window of 1000 1435 /
    # 1428; causal, several items a program, L 2048 1241 / 1203, L 512 470 / 474; but one item, L 4096, has none: 2110 / 2141. No
    # mask, L 512: 20 bytes and p in half precision 682, so 657
    if drops and (seen <= 512 or (masked and not (sloped and cut_once and seen > SHORT // 2))):
        dkv = dataclasses.replace(dkv, plain=True, brief=1 if sloped and cut_once else None)
    # beside a mask float32 p that is summed spills 116 to 216 bytes. Both passes and the gradient of a bias of keys, us, p in half
    # precision / in float32 / so: L 4096 causal 2079 / 2161 / 2093, lengths 3606 / 3867 / 3628; L 512, which spills 4 to 60, 635 /
    # 628 / 649, causal 466 / 464 / 474, lengths 616 / 613 / 630
    if summed and masked and not drops and seen > 512:
        dkv = dataclasses.replace(dkv, plain=True, brief=1)
    # L 16384: 8237 us, three stages 8703, p in half precision 8980; causal 4346, 4467, 4596. Where a branch decides on a mask as
    # large as the scores 4 bytes are spilled: 3481 us of both passes, so 3434; but a causal array, of full tiles, 1882 and 1914
    fused = WalkConfig(**FUSED, masks_all=tiled) if fuses else None
    return {"dq": dq, "dkv": dkv, "dk": dkv, "dv": dkv, "fused": fused}


def _wide(wide: int, scattered: bool, capped: bool, summed: bool) -> Kernels:
    """D192 and D256: dk and dv in roles, or, where E != Ev, one after the other. scattered: there is a mask that is no slope.

    Both passes, us, two tiles of p on their way (in half precision beside dropout or a bias, D256) / one in float32, H200,
    2026-11-30: D256 L 16384 13880 / 13457, causal 6597 / 6404; L 4096 3265 / 3258, causal 1730 / 1713, dropout 3702 / 3546,
    bfloat16 bias 4354 / 4212, of keys 3662 / 3539; L 512 566 / 557, dropout 630 / 610; D192 2641 / 2592, causal 1384 / 1366. But
    lengths 2965 / 2990 (D192 2365 / 2328), a bool mask 3718 / 3728, L 512 645 / 654, D192 3017 / 3041. One tile beside the
    gradient of a bias of keys, which spills 12 to 36 bytes there: L 4096 3671 / 3520, causal 1904 / 1880, lengths 3302 / 3224.
    """
    dkv = WalkConfig(roles=True, plain=True, buffers=2 if scattered or capped else 1)
    dv = WalkConfig(masks_all=True)
    if wide <= 192:
        dq = WalkConfig(early=True)  # B4 H8 L4096: 850 us, not early 1088; causal 461, every tile masked 465, not early 604
        # in roles 1192 us, several row tiles 1172, p in half precision 1274, one after the other 1513; causal 657, 634, 698, 901
        return {"dq": dq, "dkv": dkv, "dk": dv, "dv": dv, "fused": None}
    # causal, L 16384: 1984 us, not every tile masked 2017, p in half precision 2049, not early 3866
    dq = WalkConfig(masks_all=True, brief=1, early=True)
    # in roles: L 2048 780 us, p in half precision 832, not plain 878, one after the other 1133; causal, L 16384: 2898, 3223,
    # 3615, 4674
    dk = WalkConfig(masks_all=True, half=not summed, brief=1, ahead=0)  # where E != Ev; L 16384: 5461 us, one warpgroup 6835
    return {"dq": dq, "dkv": dkv, "dk": dk, "dv": dv, "fused": None}


def _short_rows(
    own: Kernels, heads: int, group: int, query_len: int, key_len: int, wide: int, more: bool, tiled: bool
) -> Kernels:  # fmt: skip
    """The configurations, without a loading warpgroup where a row is a few tiles, as `tuning._short_rows`. more: masks, dropout
    or a bias.

    H200, 2026-11-29, both passes, us, before / dq so / dk and dv so / both: B64 H16 L64 D64 55.7 / 44.2 / 50.6 / -, 16 heads
    on 4 51.6 / 39.1 / 40.7 / 29.2, L16 40.7 / 31.1 / 32.7 / 22.8, float32 bias 86.6 / 58.9 / 81.0 / 53.7, D128 85.2 / 82.8 /
    82.3 / 79.8. Few programs: B4 H12 L128 D64 14.7 / 14.1 / 13.3 / -. Many, 128 keys: B32 H8 25.9 / 24.7 / 26.0, but B32 H12
    34.5 / 35.4 / 37.1; 192 keys 80.0 / 71.9 / 79.7; 256 67.1 / 67.7 / 71.7.
    """
    few = heads * cdiv(query_len, 64) <= 2 * tuning.SMS
    if wide > 128:
        return own

    def without_loader(one: WalkConfig | None, tiles: int) -> WalkConfig | None:
        ring = {"block_k": 64, "stages": tiles, "brief": None, "ahead": 0, "bias_stages": tiles}
        return one and dataclasses.replace(one, alone=True, warpgroups=1, masks_all=False, split=1, **ring)

    found, steps = dict(own), cdiv(query_len, 64) * group
    if key_len <= 64 or (key_len <= 128 and few) or (128 < key_len <= 192 and wide <= 64 and not more):
        found["dq"] = without_loader(own["dq"], cdiv(key_len, 64))
    if steps <= (2 if tiled else 4) and (query_len <= 64 or (max(query_len, key_len) <= 128 and few)):
        found |= {name: without_loader(own[name], steps) for name in ("dkv", "dk", "dv")}
    return found


ROOM = (232, 40)
"""Registers where the loading warpgroup has more to know than 24 hold: which rows are hidden, where tiles of a bias lie. No
computing loop is longer for it. Both passes, H200, 2026-11-29, us, before / so, and hidden rows cleared without registers:
D128 segments 617 / 605, dropout 4039 / 4048 to 4150 (varies by 4 %), L 512 552 / 551; D64 bias 6261 / 6155. At D128 dk and dv
need their 240 (C7512)."""

FUSED: dict[str, Any] = {"plain": True, "registers": (216, 72)}
"""Of the fused kernel: 216 registers let nothing be in flight under ds (C7512), 72 hold a piece of dq; more than 504 hang."""

SHORT = 3072
"""Keys that a row sees on average under a causal mask of length 4096, and some; half of it for dk and dv beyond D64. Several
row tiles / single ones side by side, H200: D128 L4096 dq 573 / 598 us, dkv 808 / 785; L2048 dkv 437 / 441; D256 L4096 dkv 830 /
817; D64 L2048 dkv 573 / 637."""

MANY = 12 * tuning.SMS
"""Items whose shares come out even; of fewer, single ones are more even: 28 heads on 4, L 4096, dq 282 / 257 us, dkv 409 / 353."""

PROGRAMS = 3 * tuning.SMS
"""Fewer of them leave SMs idle under a causal mask, where the heaviest is twice the average one."""


def _shared_out(own: WalkConfig, heads: int, key_len: int, group: int) -> WalkConfig:
    """The configuration with PROGRAMS programs, if the query heads of a group can be divided for it; heads: B * H, of keys.

    Qwen2-7B's 4, at 4096 keys and causal: 128 programs, the heaviest of which takes twice as long as all of them would if they were
    even: 704 us; in 2 shares 586, in 4 482 (H100, 2026-11-25).
    """
    return dataclasses.replace(own, split=max(1, min(group, cdiv(PROGRAMS, heads * cdiv(key_len, own.rows)))))


LESS: tuple[dict[str, Any], ...] = (
    {"row_tiles": 1},
    {"bias_stages": 1},
    {"stages": 2},
    {"brief": 1},
    {"ahead": 0},
    {"block_k": 64},
    {"warpgroups": 1, "registers": tuning.OF_TWO},
)
"""What a configuration gives up, in this order, until it fits the shared memory."""

LESS_IN_ROLES: tuple[dict[str, Any], ...] = ({"buffers": 1}, {"bias_stages": 1}, {"half": True})
"""`buffers` not with a softcap, whose slope may need the second one: where it is small, where p is in half precision, or beside a
bias (`Recipe.holds_slope`). `half` not where ds is summed: dk and dv are made one after the other then."""


def fitted(kernel: str, config: WalkConfig, *, summed: bool = False, **facts: Any) -> WalkConfig | None:
    """The configuration, with less where it needs more shared memory than there is; None where roles do not fit at all."""
    kept = {name for name, holds in (("buffers", facts.get("capped")), ("half", summed)) if holds}
    less = [change for change in LESS_IN_ROLES if not kept & change.keys()] if config.roles else LESS
    found = tuning.fitted(config, less, lambda config: shared_bytes(kernel, config, **facts))
    return None if config.roles and shared_bytes(kernel, found, **facts) > tuning.SHARED_MEMORY else found


def shared_bytes(
    kernel: str, config: WalkConfig, *, head_dim: int, value_head_dim: int, drops: bool = False, capped: bool = False,
    biased: bool = False, bias_bytes: int = 0,
) -> int:  # fmt: skip
    """Of a program of 'dq', 'dkv', 'dk', 'dv' or 'fused': its rows, tiles of columns, and what comes with each query."""
    E, Ev = (cdiv(dim, 16) * 16 for dim in (head_dim, value_head_dim))
    ring = config.bias_stages * config.block_k * (config.rows * bias_bytes if bias_bytes else 4 if biased else 0)
    if kernel == "dq":
        stored = config.rows * config.block_k * bias_bytes  # a tile of the bias's gradient on its way out
        tiles = config.block_k * (config.stages * E + config.brief_stages * Ev)
        results = config.rows * E if config.row_tiles > 1 else 0  # else they leave from the memory of their queries
        return 2 * (config.rows * (E + Ev) + tiles + results) + ring + stored
    if config.roles:
        tiles = 2 * config.rows * E + 2 * config.stages * config.block_k * E
        handed = 2 if capped else config.buffers  # the slope may go with p
        handed *= config.rows * config.block_k * (2 if config.half else 4)
        words = whole(8 * config.stages * config.block_k) if drops else 0
        numbers = whole((12 if biased else 8) * config.stages * config.block_k) + (whole(4 * config.rows) if biased else 0)
        return 2 * tiles + handed + words + numbers + ring
    q_stages = config.stages + config.ahead
    own = config.rows * (E + (Ev if kernel != "dv" or E != Ev else 0))
    tiles = config.block_k * (q_stages * E + config.brief_stages * Ev)
    biased = biased or bias_bytes > 0
    a_query = 4 * q_stages * config.block_k  # bytes of a number for each
    numbers = whole(a_query * (3 if biased else 2)) + (whole(2 * a_query) if drops else 0)
    numbers += whole(4 * config.rows) if biased else 0  # sums of ds, for the gradient of a bias of keys
    dq = 2 * 2 * config.rows * config.block_k if kernel == "fused" else 0
    results = config.rows * E if config.row_tiles > 1 and kernel != "fused" and E == Ev else 0
    return 2 * (own + tiles + results) + numbers + dq + ring
