"""Methods that compress weights."""
