"""The command line, `kbit`: the only place that prints results and exits."""

from kbit.cli.main import main as main
