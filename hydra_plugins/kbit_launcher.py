"""The classes that Hydra looks for. It accepts plugins only from the namespace package hydra_plugins."""

from kbit.cli.hydra.launcher import SweepLauncher, SweepSweeper


class KbitLauncher(SweepLauncher):
    """kbit's launcher, as kbit.cli.hydra.launcher describes it."""


class KbitSweeper(SweepSweeper):
    """kbit's sweeper, as kbit.cli.hydra.launcher describes it."""
