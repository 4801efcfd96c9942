"""What a compression costs, measured: perplexity, KL and agreement to the dense model, speed."""
