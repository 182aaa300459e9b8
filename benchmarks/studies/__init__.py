"""Short measured answers to open questions: `python -m benchmarks.studies NAME`."""
