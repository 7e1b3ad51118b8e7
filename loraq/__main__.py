"""`python -m loraq`: the command, for where the script is not on the path (torchrun, a wheel under test)."""

from loraq.cli import main

main()
