"""Tensors of a PyTorch checkpoint, by their names, into nnx parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx


def read_directory(directory: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, tensors) of a local checkpoint: `config.json` and one or more `*.safetensors`, as Hugging Face stores them."""
    from safetensors.flax import load_file  # arrays of JAX: NumPy has no bfloat16

    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}.")
    config = json.loads((Path(directory) / "config.json").read_text())
    return config, {name: tensor for file in files for name, tensor in load_file(str(file)).items()}


class Checkpoint:
    """The tensors of a checkpoint, each to be used once: what is missing, left over or of another size is an error."""

    def __init__(self, tensors: Mapping[str, Any], dtype: Any = jnp.float32, ignore: tuple[str, ...] = ()):
        self._left = {name: tensor for name, tensor in tensors.items() if name not in ignore}
        self._dtype = dtype

    def into(self, parameter: nnx.Variable, name: str, *, is_kernel: bool = False) -> None:
        """Set a parameter. is_kernel: torch's Linear is (out, in), a kernel of ours (in, out), its heads in the same order."""
        if name not in self._left:
            raise ValueError(f"the checkpoint has no {name!r}.")
        tensor = jnp.asarray(self._left.pop(name), self._dtype)
        tensor = tensor.T if is_kernel else tensor
        if tensor.size != parameter.size:
            raise ValueError(f"{name} has {tensor.size} numbers, the model wants {tuple(parameter.shape)}: is config.json its own?")
        parameter.set_value(tensor.reshape(parameter.shape))

    def linear(self, layer: Any, name: str) -> None:
        """The kernel and, where there is one, the bias of a Linear or LinearGeneral."""
        self.into(layer.kernel, f"{name}.weight", is_kernel=True)
        if layer.bias is not None:
            self.into(layer.bias, f"{name}.bias")

    def norm(self, layer: Any, name: str) -> None:
        """The scale and, where there is one, the bias of a norm."""
        self.into(layer.scale, f"{name}.weight")
        if getattr(layer, "bias", None) is not None:
            self.into(layer.bias, f"{name}.bias")

    def done(self) -> None:
        """Nothing may be left: a tensor that the model does not use is a model that is not the checkpoint's."""
        if self._left:
            raise ValueError(f"the checkpoint has tensors that this model does not: {sorted(self._left)[:5]}.")
