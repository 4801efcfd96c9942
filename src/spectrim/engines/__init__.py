"""The plumbing: everything that walks a model, feeds it data or trains it, so that methods need not."""
