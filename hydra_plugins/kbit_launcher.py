"""The entries that Hydra looks for: it accepts plugins only from the namespace package hydra_plugins."""

from kbit.launcher import SweepLauncher, SweepSweeper


class KbitLauncher(SweepLauncher):
    """kbit's sweep launcher; see kbit.launcher."""


class KbitSweeper(SweepSweeper):
    """kbit's sweeper; see kbit.launcher."""
