"""`python -m kbit` is the command `kbit`."""

from kbit.cli import main

main()
