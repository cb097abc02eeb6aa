"""Speed beside the peers, in the same process and run: `python -m benchmarks.run`."""
