"""The Qwen2 example against Hugging Face's Qwen2: logits and greedy tokens in prefill, chunks, decode and padded batches."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.examples import decoder, qwen2

L, NEW, LEFT = 20, 8, (20, 13)
WITHIN = 2e-5  # of logits of standard deviation 2, float32


@functools.cache
def peer():
    """(Hugging Face's model in float32, ours with its weights)."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**qwen2.SMALL, attn_implementation="sdpa")
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():  # the initialiser's logits have a deviation of 0.2 and hide errors
        for name, parameter in theirs.named_parameters():
            spread = 1 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(spread * torch.randn_like(parameter) + (1 if "norm" in name else 0))
        theirs.lm_head.weight.mul_(2)
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return theirs, qwen2.load(qwen2.config_from(config.to_dict()), weights)


def prompts():
    return np.random.default_rng(0).integers(1, 256, (2, L))


def their_logits(tokens, mask=None):
    import torch

    theirs, _ = peer()
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        position = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        return theirs(torch.tensor(tokens), attention_mask=mask, position_ids=position, use_cache=False).logits.numpy()


def left_padding():
    return (np.arange(L)[None] >= L - np.array(LEFT)[:, None]).astype(np.int64)


@pytest.mark.torch
def test_prefill(backend_of_layers):
    _, ours = peer()
    expected = their_logits(prompts())
    assert 1 < expected.std() < 4
    with sdpa_kernel(backend_of_layers):
        got, caches = ours(jnp.asarray(prompts()), ours.make_caches(2, L + NEW))
        without_cache = ours(jnp.asarray(prompts()))
    np.testing.assert_allclose(got, expected, atol=WITHIN)
    np.testing.assert_allclose(without_cache, expected, atol=WITHIN)
    assert caches[0].lengths.tolist() == [L, L]


@pytest.mark.torch
def test_chunked_prefill(backend_of_layers):
    _, ours = peer()
    caches, got = ours.make_caches(2, L), []
    with sdpa_kernel(backend_of_layers):
        for start, stop in ((0, 10), (10, 20)):
            logits, caches = decoder.extend(ours, jnp.asarray(prompts()[:, start:stop]), caches, last_only=False)
            got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, 1), their_logits(prompts()), atol=WITHIN)


@pytest.mark.torch
def test_decode_in_one_trace(backend_of_layers):
    _, ours = peer()
    tokens, traces = np.random.default_rng(1).integers(1, 256, (2, L + NEW)), []

    @nnx.jit
    def step(model, token, caches):
        traces.append(token.shape)
        return model(token, caches, last_only=True)

    with sdpa_kernel(backend_of_layers):
        logits, caches = ours(jnp.asarray(tokens[:, :L]), ours.make_caches(2, L + NEW), last_only=True)
        got = [logits]
        for i in range(L, L + NEW):
            logits, caches = step(ours, jnp.asarray(tokens[:, i : i + 1]), caches)
            got.append(logits)
    assert traces == [(2, 1)]
    np.testing.assert_allclose(np.stack(got, 1), their_logits(tokens)[:, L - 1 :], atol=WITHIN)


@pytest.mark.torch
@pytest.mark.parametrize("chunk", [None, pytest.param(10, marks=pytest.mark.slow)])
def test_left_padded_batch(backend_of_layers, chunk):
    """Logits of the tokens that exist, and greedy tokens as Hugging Face's `generate` gives."""
    import torch

    theirs, ours = peer()
    mask = left_padding()
    tokens = prompts() * mask
    with sdpa_kernel(backend_of_layers):
        got, _ = ours(jnp.asarray(tokens), ours.make_caches(2, L), lengths=jnp.asarray(LEFT), padding="left")
        ours_next = decoder.generate(ours, jnp.asarray(tokens), NEW, lengths=jnp.asarray(LEFT), chunk=chunk)
    expected = their_logits(tokens, mask)
    for row, length in enumerate(LEFT):
        np.testing.assert_allclose(got[row, -length:], expected[row, -length:], atol=WITHIN)
    arguments = {"attention_mask": torch.tensor(mask), "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    theirs_next = theirs.generate(torch.tensor(tokens), pad_token_id=0, eos_token_id=None, **arguments)[:, L:]
    np.testing.assert_array_equal(ours_next, theirs_next.numpy())


def test_generation_however_the_prompt_is_cut():
    model, tokens = small(), jnp.asarray(prompts())
    expected = decoder.generate(model, tokens, 3)
    for options in ({"padding": "right", "chunk": 10}, {"padding": "left", "chunk": 7}, {"lengths": [L, L]}):
        np.testing.assert_array_equal(decoder.generate(model, tokens, 3, **options), expected)
    with pytest.raises(ValueError, match="pad them on the left"):
        decoder.generate(model, tokens, 3, lengths=[L, L], padding="right", chunk=10)


@pytest.mark.torch
@pytest.mark.slow
def test_right_padded_batch_gives_the_same_tokens():
    _, ours = peer()
    right = np.zeros_like(prompts())
    for row, length in enumerate(LEFT):
        right[row, :length] = prompts()[row, L - length :]
    left = decoder.generate(ours, jnp.asarray(prompts() * left_padding()), NEW, lengths=jnp.asarray(LEFT))
    ours_right = decoder.generate(ours, jnp.asarray(right), NEW, lengths=jnp.asarray(LEFT), padding="right")
    np.testing.assert_array_equal(left, ours_right)


@pytest.mark.torch
def test_a_checkpoint_directory(tmp_path):
    """What Hugging Face saves, this loads: the same logits; a foreign or broken checkpoint says so."""
    theirs, ours = peer()
    theirs.save_pretrained(tmp_path)
    loaded = qwen2.load_directory(tmp_path, jnp.float32)
    np.testing.assert_array_equal(loaded(jnp.asarray(prompts())), ours(jnp.asarray(prompts())))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="expected a Qwen2 checkpoint"):
        qwen2.load_directory(tmp_path)


def small():
    return decoder.Decoder(qwen2.config_from({**qwen2.SMALL, "num_hidden_layers": 1}), rngs=nnx.Rngs(0))


def test_modes_agree_without_torch():
    """Prefill, chunks, decode and padding on one side or the other are one function."""
    model, tokens = small(), jnp.asarray(prompts())
    full = model(tokens)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        caches, got = model.make_caches(2, L), []
        for start, stop in ((0, 9), (9, 10), (10, 11), (11, L)):
            logits, caches = model(tokens[:, start:stop], caches)
            got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), full, atol=WITHIN)
    lengths = jnp.array([L, 6])
    right = model(tokens, lengths=lengths, last_only=True)
    np.testing.assert_allclose(right[1], full[1, 5], atol=WITHIN)
    shifted = jnp.stack([tokens[0], jnp.roll(tokens[1], L - 6)])
    np.testing.assert_allclose(model(shifted, lengths=lengths, padding="left", last_only=True), right, atol=WITHIN)


def compiled(backend, tokens, slots):
    model = small()
    graph, state = nnx.split(model)
    caches = model.make_caches(tokens.shape[0], slots)
    with sdpa_kernel(backend):
        step = jax.jit(lambda state, tokens, caches: nnx.merge(graph, state)(tokens, caches, last_only=True), donate_argnums=2)
        return step.lower(state, tokens, caches).compile().as_text()


def test_the_decode_step_makes_no_array_of_scores():
    """Of everything in the compiled step, only keys, values and numbers per slot are as long as the cache: no heads x slots."""
    slots = 4096
    text = compiled(SDPBackend.EFFICIENT_ATTENTION, jnp.zeros((2, 1), jnp.int32), slots)
    long = {shape for shape in re.findall(r"\[([\d,]+)\]", text) if str(slots) in shape.split(",")}
    assert f"2,{slots},2,16" in long
    assert long <= {f"2,{slots},2,16", f"2,{slots}", f"{slots}"}, long


def test_a_chunk_makes_no_array_of_L_by_S():
    tokens, slots = jnp.zeros((1, 768), jnp.int32), 4096 + 128
    for backend, makes in ((SDPBackend.EFFICIENT_ATTENTION, False), (SDPBackend.MATH, True)):  # the search does find MATH's
        assert (f"768,{slots}" in compiled(backend, tokens, slots)) is makes


def test_missing_and_foreign_tensors_are_named():
    config = qwen2.config_from(qwen2.SMALL)
    with pytest.raises(ValueError, match=r"no 'model.embed_tokens.weight'"):
        qwen2.load(config, {})
    with pytest.raises(ValueError, match="only plain RoPE"):
        qwen2.config_from({**qwen2.SMALL, "rope_scaling": {"rope_type": "yarn"}})


def test_it_runs_as_a_module(capsys):
    qwen2.main(["--new-tokens", "2", "--dtype", "float32"])
    assert "2 tokens in" in capsys.readouterr().out
