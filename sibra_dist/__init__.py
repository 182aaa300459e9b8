"""SiBRA-Dist: a distributed trainer for single-branch recommender models."""

__version__ = "0.1.0"
