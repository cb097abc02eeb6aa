"""The ViT example against Hugging Face's."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.examples import vit
from jax_sdpa.examples.weights import read_directory

SMALL = {
    **vit.BASE,
    "image_size": 48,
    "patch_size": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGES = np.random.default_rng(0).standard_normal((2, 48, 48, 3)).astype(np.float32)


@pytest.mark.torch
def test_as_pytorch(backend_of_layers, tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = transformers.ViTModel(transformers.ViTConfig(**SMALL, attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = theirs(torch.tensor(IMAGES).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    theirs.save_pretrained(tmp_path)
    with sdpa_kernel(backend_of_layers):
        got = vit.load(*read_directory(tmp_path))(jnp.asarray(IMAGES))
    assert got.shape == (2, 37, 64)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_every_backend_gives_the_same():
    model, got = vit.ViT(SMALL, rngs=nnx.Rngs(0)), []
    for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):
            got.append(model(jnp.asarray(IMAGES)))
    np.testing.assert_allclose(*got, atol=1e-5)


def test_it_runs_as_a_module(capsys):
    vit.main(["--batch", "1", "--layers", "1"])
    assert "1 images in" in capsys.readouterr().out
