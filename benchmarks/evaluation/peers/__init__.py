"""Evaluations with other libraries, each run by the interpreter of the environment that holds it."""
