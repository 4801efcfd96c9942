"""`python -m spectrim` is the command line."""

from spectrim.cli import main

main()
