"""The entries that Hydra looks for: it accepts plugins only from the namespace package hydra_plugins."""

from kbit.cli.launcher import SweepLauncher, SweepSweeper


class KbitLauncher(SweepLauncher):
    """kbit's sweep launcher; see kbit.cli.launcher."""


class KbitSweeper(SweepSweeper):
    """kbit's sweeper; see kbit.cli.launcher."""
