"""Kernels for products with few rows (decoding), each beside the plain torch form it must beat (choice.py).

`plain.py` and `coded.py` need Triton and are imported at first use; CUDA builds of torch bring it.
"""
