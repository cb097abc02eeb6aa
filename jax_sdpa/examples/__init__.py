"""Whole models on `jax_sdpa.nn`, each run as a module: qwen2, minilm, gpt, vit."""
