"""The calls that are compared, as real models make them; each says where its numbers come from.

A case is one line of code over `F`, which is torch or jax_sdpa (`frameworks`), and the shapes to run it at: `small` for two cores,
`full` nearer to the model's own. Heads, head dims, dtypes and scales are the models'; batch and lengths are what is scaled down.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a call, named as torch names them: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev)."""

    B: int
    Hq: int
    H: int
    L: int
    S: int
    E: int
    Ev: int

    def __str__(self) -> str:
        heads = f"{self.Hq}" if self.Hq == self.H else f"{self.Hq}/{self.H}"
        lengths = f"{self.L}" if self.L == self.S else f"{self.L}x{self.S}"
        dims = f"{self.E}" if self.Ev == self.E else f"{self.E}/{self.Ev}"
        return f"{self.B}, {heads}, {lengths}, {dims}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One call to compare.

    Fields: name, on the command line; model, in words; source, of its numbers; dtype of query, key and value; small, full; line,
    `line(F, query, key, value, **extras) -> out`; extras(shape, rng), further operands (a float one named `attn_mask` is
    differentiated); uniform, inputs from [0, 1) instead of unit normals; query_std, their standard deviation; only, the backend
    that the line itself asks for with `sdpa_kernel` (None: every backend is tried in turn).
    """

    name: str
    model: str
    source: str
    dtype: str
    small: Shape
    full: Shape
    line: Callable[..., Any]
    extras: Callable[[Shape, np.random.Generator], Arrays] | None = None
    uniform: bool = False
    query_std: float = 1.0
    only: str | None = None

    def shape(self, size: str) -> Shape:
        return {"small": self.small, "full": self.full}[size]

    def code(self) -> str:
        """The line as it is written below, without its docstring's indentation."""
        return textwrap.dedent(inspect.getsource(self.line))


# --- the lines


# fmt: off
def docs_flash(F, query, key, value):
    with F.sdpa_kernel(backends=[F.SDPBackend.FLASH_ATTENTION]):
        return F.scaled_dot_product_attention(query,key,value)


def docs_gqa(F, query, key, value):
    with F.sdpa_kernel(backends=[F.SDPBackend.MATH]):
        return F.scaled_dot_product_attention(query,key,value,enable_gqa=True)
# fmt: on


def plain(F, query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def causal(F, query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def causal_gqa(F, query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def chunk(F, query, key, value):
    mask = F.causal_lower_right(query.shape[-2], key.shape[-2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def decode(F, query, key, value, lengths):
    mask = F.key_lengths(lengths, key.shape[-2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def window(F, query, key, value):
    L, S = query.shape[-2], key.shape[-2]
    mask = F.sliding_window(L, S, L // 4)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def packed(F, query, key, value, segment_ids):
    mask = F.packed(segment_ids)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def softcap(F, query, key, value):
    return F.softcapped(query, key, value, scale=256**-0.5, softcap=50.0)


def masked(F, query, key, value, attn_mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


def masked_gqa(F, query, key, value, attn_mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, enable_gqa=True)


def bias_unscaled(F, query, key, value, attn_mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=1.0)


def causal_mla(F, query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=MLA_SCALE)


MLA_SCALE = 192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2
"""DeepSeek-V2's: 1 / sqrt(E), times the square of YaRN's magnitude (factor 40, mscale_all_dim 0.707 in V2-Lite's config)."""


# --- the operands that some of them need


def key_padding(shape: Shape, rng: np.random.Generator) -> Arrays:
    """(B, 1, 1, S) bool: sequences of falling length, as a tokenizer's attention_mask."""
    lengths = np.linspace(shape.S, 1, shape.B).astype(int)
    return {"attn_mask": (np.arange(shape.S) < lengths[:, None])[:, None, None, :]}


def left_padding(shape: Shape, rng: np.random.Generator) -> Arrays:
    """(B, 1, L, S) bool: causal behind the padding, which stands on the left; queries in the padding attend to nothing."""
    starts = np.linspace(0, shape.S - 1, shape.B).astype(int)[:, None, None, None]
    q, k = np.arange(shape.L)[:, None], np.arange(shape.S)[None, :]
    return {"attn_mask": (k <= q) & (k >= starts)}


def cache_lengths(shape: Shape, rng: np.random.Generator) -> Arrays:
    """(B,) int32: how many slots of a static cache each sequence has filled."""
    return {"lengths": np.linspace(shape.S, 1, shape.B).astype(np.int32)}


def segments(shape: Shape, rng: np.random.Generator) -> Arrays:
    """(B, L) int32: four sequences of unequal length packed into each row."""
    ids = np.searchsorted([shape.L // 8, shape.L // 2, 3 * shape.L // 4], np.arange(shape.L), side="right")
    return {"segment_ids": np.broadcast_to(ids.astype(np.int32), (shape.B, shape.L)).copy()}


def position_bias(shape: Shape, rng: np.random.Generator) -> Arrays:
    """(1, Hq, L, S) float32, shared by the batch and learned: it has a gradient."""
    return {"attn_mask": rng.standard_normal((1, shape.Hq, shape.L, shape.S)).astype(np.float32)}


TORCH_DOCS = "examples in the docstring of torch.nn.functional.scaled_dot_product_attention, torch 2.13"
HF = "config.json of {} (Hugging Face)"

CASES: tuple[Case, ...] = (
    Case(
        "docs-flash", "PyTorch's first example, FLASH_ATTENTION asked for", TORCH_DOCS, "float16",
        Shape(32, 8, 8, 128, 128, 64, 64), Shape(32, 8, 8, 128, 128, 64, 64), docs_flash, uniform=True, only="FLASH_ATTENTION",
    ),
    Case(
        "docs-gqa", "PyTorch's second example (Llama 3's heads), MATH asked for", TORCH_DOCS, "float16",
        Shape(32, 32, 8, 128, 128, 64, 64), Shape(32, 32, 8, 128, 128, 64, 64), docs_gqa, uniform=True, only="MATH",
    ),
    Case(
        "qwen2-7b", "Qwen2-7B, prefill", HF.format("Qwen/Qwen2-7B"), "bfloat16",
        Shape(1, 28, 4, 256, 256, 128, 128), Shape(1, 28, 4, 2048, 2048, 128, 128), causal_gqa,
    ),
    Case(
        "qwen2-7b-packed", "Qwen2-7B, training on packed sequences", HF.format("Qwen/Qwen2-7B"), "bfloat16",
        Shape(1, 28, 4, 256, 256, 128, 128), Shape(1, 28, 4, 2048, 2048, 128, 128), packed, segments,
    ),
    Case(
        "qwen2-left-padded", "Qwen2-0.5B, a left-padded batch: queries that attend to nothing", HF.format("Qwen/Qwen2-0.5B"),
        "bfloat16", Shape(4, 14, 2, 128, 128, 64, 64), Shape(4, 14, 2, 1024, 1024, 64, 64), masked_gqa, left_padding,
    ),
    Case(
        "llama3-8b", "Llama 3 8B, prefill", HF.format("meta-llama/Meta-Llama-3-8B"), "bfloat16",
        Shape(1, 32, 8, 256, 256, 128, 128), Shape(1, 32, 8, 2048, 2048, 128, 128), causal_gqa,
    ),
    Case(
        "llama3-8b-chunk", "Llama 3 8B, chunked prefill: causal_lower_right", HF.format("meta-llama/Meta-Llama-3-8B"), "bfloat16",
        Shape(1, 32, 8, 64, 320, 128, 128), Shape(1, 32, 8, 512, 4096, 128, 128), chunk,
    ),
    Case(
        "llama3-8b-decode", "Llama 3 8B, decode with a static KV cache", HF.format("meta-llama/Meta-Llama-3-8B"), "bfloat16",
        Shape(4, 32, 8, 1, 1024, 128, 128), Shape(8, 32, 8, 1, 4096, 128, 128), decode, cache_lengths,
    ),
    Case(
        "mistral-7b-window", "Mistral 7B, sliding window (of L / 4 keys; the model's has 4096)",
        HF.format("mistralai/Mistral-7B-v0.1"), "bfloat16",
        Shape(1, 32, 8, 384, 384, 128, 128), Shape(1, 32, 8, 2048, 2048, 128, 128), window,
    ),
    Case(
        "gemma2-9b-softcap", "Gemma 2 9B, logits capped at 50", HF.format("google/gemma-2-9b"), "bfloat16",
        Shape(1, 16, 8, 192, 192, 256, 256), Shape(1, 16, 8, 2048, 2048, 256, 256), softcap,
    ),
    Case(
        "bert-padding", "BERT base, key padding", HF.format("google-bert/bert-base-uncased"), "float32",
        Shape(4, 12, 12, 128, 128, 64, 64), Shape(16, 12, 12, 512, 512, 64, 64), masked, key_padding,
    ),
    Case(
        "whisper-cross", "Whisper small, cross attention onto 30 s of audio", HF.format("openai/whisper-small"), "float16",
        Shape(1, 12, 12, 64, 1500, 64, 64), Shape(4, 12, 12, 448, 1500, 64, 64), plain,
    ),
    Case(
        "t5-bias", "T5 base, learned position bias, scale 1", HF.format("google-t5/t5-base"), "float32",
        Shape(2, 12, 12, 128, 128, 64, 64), Shape(8, 12, 12, 512, 512, 64, 64), bias_unscaled, position_bias, query_std=0.125,
    ),
    Case(
        "vit-base", "ViT base, 197 tokens", HF.format("google/vit-base-patch16-224"), "float32",
        Shape(4, 12, 12, 197, 197, 64, 64), Shape(32, 12, 12, 197, 197, 64, 64), plain,
    ),
    Case(
        "siglip-so400m", "SigLIP So400m, head dim 72", HF.format("google/siglip-so400m-patch14-224"), "float32",
        Shape(1, 16, 16, 256, 256, 72, 72), Shape(8, 16, 16, 256, 256, 72, 72), plain,
    ),
    Case(
        "deepseek-mla", "DeepSeek-V2-Lite, prefill, Ev != E", HF.format("deepseek-ai/DeepSeek-V2-Lite"), "bfloat16",
        Shape(1, 16, 16, 256, 256, 192, 128), Shape(1, 16, 16, 2048, 2048, 192, 128), causal_mla,
    ),
    Case(
        "float64", "float64, causal", "gradcheck's precision; no model", "float64",
        Shape(2, 4, 4, 64, 96, 32, 32), Shape(2, 4, 4, 512, 768, 32, 32), causal,
    ),
)  # fmt: skip

BY_NAME = {case.name: case for case in CASES}


def named(names: list[str] | None) -> list[Case]:
    """The cases of these names, all of them for None; ValueError for a name that is none."""
    if not names:
        return list(CASES)
    if unknown := [name for name in names if name not in BY_NAME]:
        raise ValueError(f"no case is called {', '.join(unknown)}; there are {', '.join(BY_NAME)}.")
    return [BY_NAME[name] for name in names]
