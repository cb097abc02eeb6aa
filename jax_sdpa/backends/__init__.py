"""The mirror of `torch.backends`."""
