"""How training scales: synthetic datasets of growing sizes, their bytes, cost and memory: `python -m benchmarks.scale`."""
