"""`python -m kbit` is the command `kbit`."""

from kbit.cli.main import main

main()
