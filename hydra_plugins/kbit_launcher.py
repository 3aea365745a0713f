"""The entry that Hydra looks for: it accepts launchers only from the namespace package hydra_plugins."""

from kbit.launcher import SweepLauncher


class KbitLauncher(SweepLauncher):
    """kbit's sweep launcher; see kbit.launcher."""
