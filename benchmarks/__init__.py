"""What the fused losses cost beside the ones that people write: `pytest benchmarks/`, `python -m benchmarks.report`."""
