"""`python -m condmod` is the command `condmod`."""

from condmod.cli import main

main()
