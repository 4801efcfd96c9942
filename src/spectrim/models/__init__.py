"""How to walk a model: which linear layers its decoder has, and which of them read the same input."""
