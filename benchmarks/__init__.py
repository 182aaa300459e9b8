"""Every figure that the documentation claims, one command each. Results that were recorded lie in `benchmarks/results`."""
