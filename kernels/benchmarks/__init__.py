"""Microbenchmarks of the Triton kernels: `python -m benchmarks.run`, with PYTHONPATH=.:kernels.

A case is a row of a table (`tables`) and knows its shapes, the least bytes and operations they take, and how
to prepare the calls that are timed. docs/kernels.md says what is measured, and how.
"""
