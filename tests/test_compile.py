"""The forward kernel compiled to sm_90a machine code on a machine without a GPU: no register spills, no serialised wgmma.

It needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version (`pip install --no-deps`: no driver, no CUDA). CI's newer leg
installs them for this file alone. `h200.txtpb` is XLA's description of the chip (openxla/xla, target_config/specs).
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jax_sdpa import compat

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
pytestmark = pytest.mark.skipif(
    os.environ.get("JAX_SDPA_COMPILE") != "1" and (compat.JAX_VERSION < (0, 11, 2) or not HAS_PLUGIN),
    reason="compiling for a GPU that is not there needs jax 0.11.2 and the wheels jax-cuda13-plugin and jax-cuda13-pjrt",
)

PREFACE = """
import pathlib, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.backend import backends
from jax.sharding import NamedSharding, PartitionSpec

import jax_sdpa
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, Packed, causal
from jax_sdpa.device import assume_device

def mesh_of(gpus):
    backends()  # registers the plugin
    target = pathlib.Path(sys.argv[1]).read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{gpus}")
    return topologies.make_mesh(topo=topology, mesh_shape=(gpus,), axis_names=("x",))
"""

PROGRAM = """
here = NamedSharding(mesh_of(1), PartitionSpec())
B, H, L, E, kind = *map(int, sys.argv[2:6]), sys.argv[6]

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

more = {
    "bool": array(B, 1, L, L, dtype=jnp.bool_), "bias": array(B, H, L, L), "causal bias": array(B, H, L, L),
    "lengths": array(B, dtype=jnp.int32), "packed": array(65, dtype=jnp.int32),
}.get(kind, array(1))

def call(q, more):
    mask = {"causal": causal(), "causal dropout": causal(), "bool": more, "bias": more}.get(kind)
    mask = causal() & more if kind == "causal bias" else mask
    mask = KeyLengths(more) if kind == "lengths" else Packed(more, right=0) if kind == "packed" else mask
    drop = dict(dropout_p=0.1, dropout_rng=jax.random.key(0)) if "dropout" in kind else {}
    return jax_sdpa.scaled_dot_product_attention(q, q, q, mask, **drop)

with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    program = jax.jit(call).lower(array(B, H, L, E), more).compile()
print("temporaries", program.memory_analysis().temp_size_in_bytes)
"""


def run(tmp_path, program, *arguments):
    """What the program prints, in a process of its own: ptxas writes past Python's streams."""
    path = tmp_path / "program.py"
    path.write_text(PREFACE + program)
    command = [sys.executable, path, Path(__file__).parent / "h200.txtpb", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    return text


LONG, SHORT = (1, 8, 16384), (32, 8, 512)
CLEAN = [
    (shape, E, kind)
    for E in (64, 128, 256)
    for shape, kind in [(LONG, "full"), (LONG, "causal"), (SHORT, "full"), (LONG, "dropout"), (LONG, "bool"), (LONG, "bias")]
] + [
    (LONG, 128, "causal dropout"),
    (LONG, 256, "causal dropout"),
    (SHORT, 64, "causal"),
    (SHORT, 256, "causal"),
    (LONG, 96, "full"),
    ((32, 8, 64), 128, "full"),
    ((32, 8, 128), 64, "full"),
    ((32, 8, 128), 64, "causal"),
    ((32, 8, 128), 128, "full"),
    ((32, 8, 64), 64, "bias"),
    ((32, 8, 256), 128, "causal bias"),
    ((16, 16, 512), 128, "causal bias"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "E", "kind"), [*CLEAN, (LONG, 128, "lengths"), (LONG, 128, "packed")], ids=str)
def test_no_spills_and_no_serialised_products(shape, E, kind, tmp_path):
    text = run(tmp_path, PROGRAM, *shape, E, kind)
    spills = [int(bytes) for bytes in re.findall(r"(\d+) bytes spill stores", text)]
    assert len(spills) >= 1, "ptxas said nothing of the kernel"
    assert max(spills) == 0, spills
    assert not re.search(r"C75\d\d", text), re.findall(r".*C75\d\d.*", text)
    batch, _, length = shape
    copies = {"bool": batch * length * length // 8}  # a bit for each score
    temporaries = int(re.findall(r"temporaries (\d+)", text)[0])
    assert temporaries <= copies.get(kind, 0) + 2**20, temporaries


BACKWARD = """
from jax_sdpa import dropout
from jax_sdpa.attention.bias import sliding_window
from pallas_kernels import flash_backward
from pallas_kernels.contracts import BackwardConfig, WalkConfig

here = NamedSharding(mesh_of(1), PartitionSpec())
E, kind = int(sys.argv[2]), sys.argv[3]
B, H, L = (32, 8, 512) if "short" in kind else (1, 32, 4096) if "shares" in kind else (1, 8, 16384)

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

x, row = array(B, H, L, E), array(B, H, L, dtype=jnp.float32)
key = array(B, H // 4 if "shares" in kind else H, L, E)
mask = causal() if "causal" in kind else sliding_window(1000, 0) if "window" in kind else None
mask = KeyLengths(jnp.full((B,), L // 8 * 7, jnp.int32)) if "lengths" in kind else mask
drop = dict(seeds=dropout.seeds(jax.random.key(0), B, H), dropout_p=0.1, generator=dropout) if "dropout" in kind else {}
drop |= dict(deterministic="fused" not in kind)

def call(q, k, v, dout, lse, delta, bias):
    more = dict(bias=bias, row_sum=lse, wants=("query", "bias") if kind.endswith("dq") else ("key", "value")) if "bias" in kind else drop
    if "roles" in kind:
        dq = WalkConfig(masks_all=True, brief=1, early=True, half=True)
        more = dict(drop, config=BackwardConfig(dq, WalkConfig(roles=True, plain=True, half=True), dq, dq))
    if "summed" in kind:
        more = dict(bias=bias[:, :, 0, None], row_sum=lse, wants=("key", "value", "bias"))
    more |= dict(softcap=50.0) if "softcap" in kind else {}
    more |= dict(keep=bias) if kind == "bool" else {}
    return flash_backward.backward(q, k, v, dout, lse, delta, layout="BHLE", scale=E**-0.5, mask=mask, **more)

program = jax.jit(call).lower(x, key, key, x, row, row, array(B, H, L, L, dtype="float32" if "bias32" in kind else "bool" if kind == "bool" else x.dtype) if "b" in kind else array(1)).compile()
print("temporaries", program.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("E", "kind"),
    [
        *((E, kind) for E in (64, 128) for kind in ("full", "causal", "dropout", "causal dropout", "bias, dq", "bias, dkv", "bool")),
        *((E, "bias32, dkv") for E in (64, 128, 256)),
        *((256, kind) for kind in ("bias, dq", "bias, dkv", "bias32, dq")),
        *((E, "window") for E in (64, 128, 256)),
        *((128, kind) for kind in ("shares", "shares, causal")),
        *((E, kind) for E in (192, 256) for kind in ("full", "causal", "roles", "roles, causal")),
        *((64, kind) for kind in ("fused", "fused, causal", "fused, dropout", "fused, causal dropout")),
        *((128, kind) for kind in ("fused", "fused, causal")),
        *((E, kind) for E in (64, 128, 256) for kind in ("short", "short, causal")),
        *((E, kind) for E in (128, 256) for kind in ("softcap", "softcap, causal")),
        *((E, "softcap, window") for E in (64, 128)),
        *((E, "bias of keys, summed, causal") for E in (64, 256)),  # D128: 0 with jax 0.11.2, 168 with 0.12.0.1 (NOTES.md)
        (128, "bias of keys, summed, lengths"),
        *((E, kind) for E in (64, 128) for kind in ("fused, softcap", "fused, softcap, causal")),
        *((128, kind) for kind in ("short, causal dropout", "window, dropout", "lengths, dropout")),
        *((E, "lengths, dropout") for E in (64, 256)),
        *((128, kind) for kind in ("short, dropout", "short, softcap", "short, lengths", "short, window, dropout")),
        *((64, kind) for kind in ("lengths", "fused, lengths", "fused, lengths, dropout")),
    ],
)  # fmt: skip
def test_no_serialised_products_backward_and_no_spills(E, kind, tmp_path):
    text = run(tmp_path, BACKWARD, E, kind)
    spills = [int(bytes) for bytes in re.findall(r"(\d+) bytes spill stores", text)]
    assert len(spills) >= 1, "ptxas said nothing of the kernels"
    assert max(spills) == 0, spills
    assert not re.search(r"C751[0-8]", text), re.findall(r".*C75\d\d.*", text)
    per_row = 3 if "bias" in kind else 2 if "dropout" not in kind else 4  # lse and delta, a sum; the words of dropout
    per_row += 2 if "summed" in kind else 0  # of each key: the bias in float32, and its gradient
    temporaries = int(re.findall(r"temporaries (\d+)", text)[0])
    rows = 32 * 8 * 512 if "short" in kind else 8 * 16384
    sums = 4 * rows * E if "fused" in kind or "shares" in kind else 0  # dq's, float32; dk and dv of each of two shares
    sums += 2 * 16384 * 16384 + 2**21 if kind == "bool" else 0  # a bit a score for dq, one for dk and dv; numbers for each tile
    assert temporaries <= 4 * per_row * rows + sums + 2**16, temporaries


BOTH_PASSES = """
sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parents[1]))  # benchmarks are not installed
from benchmarks import gpu
from benchmarks.cases import GPU_CASES

here = NamedSharding(mesh_of(1), PartitionSpec())
program, leaves = gpu.program_of(next(case for case in GPU_CASES if case.name == sys.argv[2]), True)
with assume_device("cuda:sm90"):
    jax.jit(program).lower(*(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for leaf in leaves)).compile()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "most"),
    [
        ("B4 H32 L4096 D64 bool (B,1,L,S)", 0),
        ("B4 H32 L4096 D64 bias32 (1,H,L,S)", 0),
        ("B4 H32 L4096 D64 bias16 (B,1,1,S)", 0),
        ("B4 H16 L4096 D128 bias16 (B,1,1,S)", 0),
        ("BERT: B32 H12 L512 D64 bias16 (B,1,1,S)", 0),
        ("B4 H16 L4096 D128 bool (B,1,L,S)", 0),
        ("B4 H16 L4096 D128 bool (B,1,1,S)", 0),
        ("B4 H16 L4096 D128 bias16 (B,H,L,S)", 0),
        ("B4 H16 L4096 D128 segments", 0),
        ("B4 H8 L4096 D256 lengths", 4),  # of jax 0.12.0.1 (0.11.2: 0): one number, stored and read outside of the loops
        ("64 sequences, 100 to 8000, H16 D128 causal packed", 0),
    ],
)
def test_the_benchmarks_own_calls_spill_nothing(case, most, tmp_path):
    """Public calls, forward and backward, bring more operands than the kernels above: who is hidden from everybody, lists, ids."""
    text = run(tmp_path, BOTH_PASSES, case)
    spills = [int(bytes) for bytes in re.findall(r"(\d+) bytes spill stores", text)]
    assert len(spills) >= 2, "ptxas said nothing of the kernels"
    assert max(spills) <= most, spills
    assert not re.search(r"C751[0-8]", text), re.findall(r".*C75\d\d.*", text)


DECODE = """
from pallas_kernels import flash_decode
from jax_sdpa.attention.bias import sliding_window

here = NamedSharding(mesh_of(1), PartitionSpec())
B, Hq, H, L, S, E, kind = *map(int, sys.argv[2:8]), sys.argv[8]
narrow, _, kind = kind.rpartition(" ")
narrow = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}.get(narrow)
page = {"pages": 16, "pages64": 64}.get(kind)

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

def call(q, k, numbers, pages, scales):
    mask = {"full": None, "window": sliding_window(1000, 0, numbers)}.get(kind, KeyLengths(numbers))
    more = {} if page is None else dict(pages=pages)
    more |= {} if narrow is None else dict(key_scale=scales, value_scale=scales)
    return flash_decode.decode(q, k, k, layout="BLHE", scale=E**-0.5, mask=mask, **more)

lead = (B, S) if page is None else (B * S // page, page)
program = jax.jit(call).lower(
    array(B, L, Hq, E), array(*lead, H, E, dtype=narrow or jnp.bfloat16), array(B, dtype=jnp.int32),
    array(B, S // (page or 1), dtype=jnp.int32), array(lead[0], H, lead[1], dtype=jnp.float32),
).compile()
print("temporaries", program.memory_analysis().temp_size_in_bytes)
text = program.as_text()
steps = [line for line in text[text.index("ENTRY"):].splitlines() if any(f" {name}(" in line for name in ("fusion", "copy", "while"))]
print("of XLA", len(steps), *steps, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((64, 28, 4, 1, 4096, 128), "full"),
        ((64, 28, 4, 1, 4096, 128), "lengths"),
        ((64, 28, 4, 1, 4096, 128), "pages"),
        ((8, 32, 8, 4, 4096, 128), "window"),
        ((8, 64, 8, 16, 4096, 64), "lengths"),
        ((16, 16, 8, 1, 4096, 256), "lengths"),
        ((1, 28, 4, 1, 32768, 128), "full"),
        ((64, 28, 4, 1, 4096, 128), "int8 full"),
        ((64, 28, 4, 1, 4096, 128), "fp8 full"),
        ((64, 28, 4, 1, 4096, 128), "int8 lengths"),
        ((64, 28, 4, 1, 4096, 128), "fp8 lengths"),
        ((64, 28, 4, 1, 4096, 128), "fp8 pages64"),
        ((64, 28, 4, 1, 4096, 128), "fp8 pages"),
        ((8, 32, 8, 4, 4096, 128), "fp8 window"),
        ((8, 32, 8, 16, 4096, 64), "fp8 lengths"),
        ((8, 32, 8, 16, 4096, 128), "fp8 lengths"),
        ((16, 16, 8, 1, 4096, 256), "fp8 lengths"),
        ((16, 32, 8, 8, 4096, 256), "int8 lengths"),
    ],
    ids=str,
)
def test_decode_has_no_spills_and_no_copy_of_the_cache(shape, kind, tmp_path):
    """XLA has one thing to do with the queries (rows are wanted in eights, a group's one after another), and one with lengths."""
    text = run(tmp_path, DECODE, *shape, kind)
    spills = [int(bytes) for bytes in re.findall(r"(\d+) bytes spill stores", text)]
    assert len(spills) == 2, "ptxas said nothing of the two kernels"
    assert max(spills) == 0
    assert not re.search(r"C75\d\d", text), re.findall(r".*C75\d\d.*", text)
    B, Hq, H, L, S, E = shape
    programs = 264 if "8 " in kind else 132
    pieces = 4 * (B * H + programs) * (max(8, Hq // H * L) * max(128, E) + 128)  # float32, and lse
    scales = 4 * B * H * S if kind.endswith("8 pages") else 0  # those of small pages are gathered
    temporaries = int(re.findall(r"temporaries (\d+)", text)[0])
    assert temporaries <= pieces + 4 * B * max(8 * H, Hq) * L * E + scales + 2**16, temporaries
    steps = 1 if kind.endswith("full") else 3 if scales else 2
    assert int(re.findall(r"of XLA\n(\d+)", text)[0]) <= steps, text[text.index("of XLA") :]


PAGES = """
from jax_sdpa.attention.varlen import varlen_attn

gpus, page = int(sys.argv[2]), int(sys.argv[3])
mesh, N, n = mesh_of(gpus), 64, 4096 // page

def array(*shape, spec=PartitionSpec(), dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

def call(q, k, v, cu_q, used, table):
    return varlen_attn(q, k, v, cu_q, None, 1, 4096, window_size=(-1, 0), enable_gqa=True, seqused_k=used, block_table=table)

over_heads = dict(spec=PartitionSpec(None, None, "x"))
pool = array(N * n, page, 4, 128, **over_heads)
numbers = (array(*shape, dtype=jnp.int32) for shape in ((N + 1,), (N,), (N, n)))
with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    program = jax.jit(call).lower(array(N, 28, 128, spec=PartitionSpec(None, "x")), pool, pool, *numbers).compile()
print("temporaries", program.memory_analysis().temp_size_in_bytes)
text = program.as_text()
steps = [line for line in text[text.index("ENTRY"):].splitlines() if any(f" {name}(" in line for name in ("fusion", "copy", "while"))]
print("of XLA", len(steps), *steps, sep="\\n")
print("kernels", sum("custom-call(" in line and "mosaic_gpu" in line for line in text.splitlines()), "all-" in text)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "page"), [(1, 16), (2, 128)])
def test_a_decode_step_on_pages_gathers_none_of_them(gpus, page, tmp_path):
    """Beside the kernels there are the queries on their way to rows, the tokens' sequences, the results on their way back, and one
    array of lengths; over two GPUs heads stay where they are."""
    text = run(tmp_path, PAGES, gpus, page)
    assert "kernels 2 False" in text
    assert int(re.findall(r"of XLA\n(\d+)", text)[0]) == 4, text[text.index("of XLA") :]
    assert int(re.findall(r"temporaries (\d+)", text)[0]) < 2**22


TWO_GPUS = """
mesh = mesh_of(2)

def call(q, k, lengths):
    mask = causal() & KeyLengths(lengths)
    return jax_sdpa.scaled_dot_product_attention(
        q, k, k, mask, enable_gqa=True, dropout_p=0.1, dropout_rng=jax.random.key(0)
    )

for spec, local in ((PartitionSpec("x"), "bf16[2,8,512,64]"), (PartitionSpec(None, "x"), "bf16[4,4,512,64]")):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec[: len(shape)])))

    with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        program = jax.jit(call).lower(array(4, 8, 512, 64), array(4, 4, 512, 64), array(4, dtype=jnp.int32)).compile()
    text = program.as_text()
    kernels = [line for line in text.splitlines() if "custom-call(" in line and "mosaic_gpu" in line]
    assert len(kernels) == 1 and local in kernels[0], kernels
    assert "all-gather" not in text and "all-reduce" not in text and "all-to-all" not in text
    assert program.output_shardings.spec == spec

    def loss(q, k, bias):
        return jax_sdpa.scaled_dot_product_attention(q, k, k, causal() & bias, enable_gqa=True).astype(jnp.float32).sum()

    with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
        program = gradients.lower(array(4, 8, 512, 64), array(4, 4, 512, 64), array(4, 8, 512, 512)).compile()
    text = program.as_text()
    assert sum("custom-call(" in line and "mosaic_gpu" in line for line in text.splitlines()) == 3
    assert "all-gather" not in text and "all-to-all" not in text
print("sharded as given")
"""


@pytest.mark.slow
def test_on_two_gpus_batch_and_heads_stay_sharded_and_nothing_is_gathered(tmp_path):
    assert "sharded as given" in run(tmp_path, TWO_GPUS)


RING = """
import re
from jax_sdpa.sharding import context_parallel_attention

mesh, kind = mesh_of(2), sys.argv[2]
options = {"order": "zigzag"} if kind == "zigzag" else {}
options |= dict(dropout_p=0.1, dropout_rng=jax.random.key(0)) if kind == "dropout" else {}

def call(q, k, v):
    return context_parallel_attention(
        q, k, v, is_causal=True, enable_gqa=True, mesh=mesh, axis_name="x", method="ring", **options
    )

def step(q, k, v, dout):
    out, pullback = jax.vjp(call, q, k, v)
    return out, *pullback(dout)

spec = PartitionSpec(None, None, "x")
q, kv = (jax.ShapeDtypeStruct((1, heads, 4096, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for heads in (8, 4))
with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    program = jax.jit(step).lower(q, kv, kv, q).compile()
assert all(sharding.spec == spec for sharding in program.output_shardings)
lines = program.as_text().splitlines()
kernel = lambda line: "custom-call(" in line and "mosaic_gpu" in line
first = next(n for n, line in enumerate(lines) if "collective-permute-start(" in line)
done = next(n for n, line in enumerate(lines) if n > first and "collective-permute-done(" in line)
print("kernels", sum(map(kernel, lines)), "meanwhile", sum(map(kernel, lines[first:done])))
moves = {re.sub("-(start|done)$", "", m) for line in lines for m in re.findall(r"(all-\\w+|reduce-scatter|collective-\\S+?)\\(", line)}
print("moves", sorted(moves))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kernels"), [("causal", 6), ("zigzag", 18), ("dropout", 6)])
def test_a_ring_over_two_gpus_permutes_while_its_kernels_run(kind, kernels, tmp_path):
    """Forward and backward: three kernels a visit that is not empty (2048 keys, all seen, no dropout: a fused backward, and what puts
    its sums in order); no collective but permutes, the first one behind a kernel."""
    text = run(tmp_path, RING, kind)
    assert "moves ['collective-permute']" in text
    found, meanwhile = map(int, re.findall(r"kernels (\d+) meanwhile (\d+)", text)[0])
    assert found == kernels
    assert meanwhile >= 1


REMAT = """
from jax_sdpa.remat import save_attention

mesh = mesh_of(2)
q = jax.ShapeDtypeStruct((4, 8, 512, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("x")))

def block(q):
    return jnp.sin(jax_sdpa.scaled_dot_product_attention(jnp.sin(q), q, q, is_causal=True)).astype(jnp.float32).sum()

for name, policy in (("saved", save_attention), ("recomputed", None)):
    with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        program = jax.jit(jax.value_and_grad(jax.checkpoint(block, policy=policy))).lower(q).compile()
    print(name, sum("custom-call(" in line and "mosaic_gpu" in line for line in program.as_text().splitlines()))
"""


@pytest.mark.slow
def test_saved_names_leave_one_forward_kernel_in_the_program(tmp_path):
    """Two kernels are the backward's; without the policy the forward runs again."""
    text = run(tmp_path, REMAT)
    assert "saved 3" in text
    assert "recomputed 4" in text
