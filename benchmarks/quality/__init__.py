"""The models on MovieLens 1M, beside published figures: `python -m benchmarks.quality`."""
