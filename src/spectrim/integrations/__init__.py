"""Where spectrim meets other libraries."""
