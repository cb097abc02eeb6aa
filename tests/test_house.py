"""The house keeps its shape: imports run one way, private JAX in one file, the public names are those of the contract."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jax_sdpa
import pallas_kernels

ROOT = Path(jax_sdpa.__file__).parent
KERNELS = Path(pallas_kernels.__file__).parent
FILES = sorted([*ROOT.rglob("*.py"), *KERNELS.rglob("*.py")])
BENEATH = {"request", "masks", "dropout", "errors", "device", "compat", "context"}  # the values: they know nothing above them
LAYERS = [
    BENEATH,
    {"implementations"},
    {"dispatch", "primitive", "partition"},
    {"check", "check_operands", "check_varlen", "functional", "attention", "remat"},
    {"sharding"},
    {"nn", "compare", "examples", "backends"},
]


def module_name(path):
    base = ROOT if path.is_relative_to(ROOT) else KERNELS
    parts = [base.name, *path.relative_to(base).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Every module that a file imports, also inside functions, as dotted names ('from a import b' gives a and a.b)."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def room(name):
    """'jax_sdpa.implementations.math' -> 'implementations'."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def height(name):
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT)], ids=module_name)
def test_imports_run_one_way(path):
    own = room(module_name(path))
    if not own:
        return
    assert height(own) is not None, f"{own} has no place in the layers of this test: give it one"
    for name in imports(path):
        if name.startswith("jax_sdpa.") and height(room(name)) is not None:
            assert height(room(name)) <= height(own), f"{module_name(path)} imports {name}, which lies above it"


def test_the_values_import_only_one_another():
    for path in FILES:
        if path.is_relative_to(ROOT) and room(module_name(path)) in BENEATH:
            above = {name for name in imports(path) if name.startswith("jax_sdpa.") and room(name) not in BENEATH}
            assert not above, f"{path.name} imports {above}"


def test_pallas_kernels_never_import_jax_sdpa():
    for path in FILES:
        if path.is_relative_to(KERNELS):
            assert not any(name.split(".")[0] == "jax_sdpa" for name in imports(path)), path


@pytest.mark.parametrize(
    ("library", "rooms"), [("torch", {"compare"}), ("flax", {"nn", "examples"}), ("numpy.testing", set()), ("pytest", set())]
)
def test_libraries_are_imported_only_where_they_belong(library, rooms):
    for path in FILES:
        if any(name == library or name.startswith(library + ".") for name in imports(path)):
            assert room(module_name(path)) in rooms, f"{module_name(path)} imports {library}"


def test_private_jax_is_touched_in_one_file():
    for path in FILES:
        private = {name for name in imports(path) if name.startswith(("jax._src", "jaxlib"))}
        assert not private or path == ROOT / "compat.py", f"{module_name(path)} imports {private}"
        assert "jax._src" not in path.read_text() or path == ROOT / "compat.py", path


def test_importing_the_package_brings_no_torch_and_no_flax():
    code = "import sys, jax_sdpa, jax_sdpa.attention.bias; print(sorted({'torch', 'flax', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_importing_the_package_starts_no_backend():
    """No array and no device is made at import: a program may still choose its platform."""
    code = "import jax_sdpa, jax_sdpa.attention.bias, jax_sdpa.dropout, jax; jax.config.update('jax_platforms', 'cpu'); print(jax.default_backend())"
    env = {"JAX_PLATFORMS": "no_such_platform", "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.strip() == "cpu"


PUBLIC = {
    "jax_sdpa": {"scaled_dot_product_attention", "dot_product_attention", "explain"},
    "jax_sdpa.attention": {"SDPBackend", "sdpa_kernel", "WARN_FOR_UNFUSED_KERNELS"},
    "jax_sdpa.attention.bias": {"CausalVariant", "CausalBias", "causal_upper_left", "causal_lower_right", "causal", "sliding_window", "SegmentIds", "KeyLengths", "Packed"},
    "jax_sdpa.attention.varlen": {"AuxRequest", "varlen_attn"},
    "jax_sdpa.backends.cuda": {
        *(f"enable_{kind}_sdp" for kind in ("flash", "mem_efficient", "math", "cudnn")),
        *(f"{kind}_sdp_enabled" for kind in ("flash", "mem_efficient", "math", "cudnn")),
        *(f"can_use_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
        "SDPAParams", "is_flash_attention_available", "allow_fp16_bf16_reduction_math_sdp",
    },
    "jax_sdpa.sharding": {"context_parallel_attention", "explain_context_parallel", "Plan", "to_zigzag", "from_zigzag"},
    "jax_sdpa.remat": {"save_attention"},
    "jax_sdpa.nn": {"Attention", "AttentionFn", "KVCache", "MeshAxes", "Rope", "attention_fn", "positions_in_segments"},
}  # fmt: skip
BEYOND_TORCH = {"varlen_attn": ["key_scale", "value_scale"]}  # keywords of ours alone, behind torch's


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    module = importlib.import_module(name)
    assert PUBLIC[name] <= set(module.__all__), PUBLIC[name] - set(module.__all__)
    for public in module.__all__:
        value = getattr(module, public)
        assert inspect.ismodule(value) or not callable(value) or inspect.getdoc(value), f"{name}.{public} has no docstring"


@pytest.mark.torch
@pytest.mark.parametrize("name", ["torch.nn.attention", "torch.nn.attention.bias", "torch.nn.attention.varlen"])
def test_torchs_names_have_torchs_meaning(name):
    theirs, ours = importlib.import_module(name), importlib.import_module(name.replace("torch.nn", "jax_sdpa"))
    for shared in set(theirs.__all__) & PUBLIC[ours.__name__]:
        a, b = getattr(theirs, shared), getattr(ours, shared)
        if inspect.isfunction(a) and inspect.isfunction(b):
            theirs_take, ours_take = (list(inspect.signature(inspect.unwrap(f)).parameters) for f in (a, b))
            theirs_take += BEYOND_TORCH.get(shared, [])
            assert theirs_take in (ours_take, ["size"]), shared  # torch's causal biases take *size, and two of it


def test_torchs_signature():
    parameters = inspect.signature(jax_sdpa.scaled_dot_product_attention).parameters
    assert list(parameters) == [
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
        "dropout_rng",
    ]
    assert [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY] == ["scale", "enable_gqa", "dropout_rng"]
    assert [p.default for p in parameters.values()][3:] == [None, 0.0, False, None, False, None]


@pytest.mark.parametrize("package", [jax_sdpa, pallas_kernels], ids=lambda package: package.__name__)
def test_packages_are_typed_and_documented(package):
    root = Path(package.__file__).parent
    assert (root / "py.typed").exists()
    for info in pkgutil.walk_packages([str(root)], package.__name__ + "."):
        path = Path(info.module_finder.path, *info.name.split(".")[-1:])
        source = (path / "__init__.py" if info.ispkg else path.with_suffix(".py")).read_text()
        assert not source or ast.get_docstring(ast.parse(source)), f"{info.name} has no docstring"


def test_no_assert_on_user_input():
    """Contract 4: errors are TypeError and ValueError. `check` has no assert, nor have the masks."""
    for name in (
        "check",
        "masks/base",
        "masks/packed",
        "masks/positions",
        "masks/segments",
        "functional",
        "attention/__init__",
        "attention/bias",
    ):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], name


def test_selection_never_catches_exceptions():
    """Contract 2: a backend states its limits as data; nobody tries one and falls back."""
    for name in ("dispatch", "primitive", "functional", "implementations/base"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)], name
