"""What a run tells: facts as JSON, a model card, tables."""
