"""The MiniLM example with its real weights: PyTorch's numbers, and the published ones. The weights are an optional download."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_sdpa.attention import sdpa_kernel
from jax_sdpa.examples import minilm

try:
    minilm.directory()
except FileNotFoundError as error:
    pytest.skip(f"optional, {error}", allow_module_level=True)

model = functools.cache(minilm.load)


def batch():
    tokens, lengths = minilm.tokenize(
        [*minilm.SENTENCES, "One much longer sentence, so that the other three of this batch are padded: " * 2]
    )
    return jnp.asarray(tokens), jnp.asarray(lengths)


def test_the_published_cosines(backend_of_layers):
    with sdpa_kernel(backend_of_layers):
        embeddings = np.asarray(model()(*batch()), np.float64)
    for (i, j), published in minilm.PUBLISHED.items():
        assert round(float(embeddings[i] @ embeddings[j]), 4) == published


@pytest.mark.torch
def test_as_pytorch(backend_of_layers):
    import torch
    import transformers

    theirs = transformers.BertModel.from_pretrained(minilm.directory(), attn_implementation="sdpa").eval()
    tokens, lengths = batch()
    mask = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    with torch.no_grad():
        hidden = theirs(torch.tensor(np.asarray(tokens)).long(), torch.tensor(mask).long()).last_hidden_state.numpy()
    with sdpa_kernel(backend_of_layers):
        ours, embeddings = model().hidden(tokens, lengths), model()(tokens, lengths)
    np.testing.assert_allclose(np.asarray(ours)[mask], hidden[mask], atol=1e-5)
    mean = np.where(mask[..., None], hidden, 0).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(embeddings, mean / np.linalg.norm(mean, axis=-1, keepdims=True), atol=1e-5)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the published file"):
        minilm.load(tmp_path)


def test_it_runs_as_a_module(capsys):
    minilm.main([])
    assert capsys.readouterr().out.count("published") == 3
