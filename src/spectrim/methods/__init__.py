"""One file a system, named as its paper names it."""
