"""Preparation of synthetic interactions, 1 to 50 million of them: Spark beside plain pandas, and reading the result back."""
