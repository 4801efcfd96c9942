"""Kernels for products with few rows (decoding), each beside the plain torch form it must beat (choice.py).

`plain.py`, `coded.py`, `rows.py` and `place.py` need Triton, which CUDA builds of torch bring, and are imported at
first use.
"""
