"""Preparation: raw interactions and side information to a dataset, with Spark."""
