"""Thin modules: they hold parameters and call linalg, nothing else."""
