"""`python -m longnet` is the command `longnet`."""

from longnet.cli import main

main()
