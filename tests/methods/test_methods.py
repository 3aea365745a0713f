"""Every method that an experiment can name is there."""

from __future__ import annotations

from kbit.methods.config import METHODS
from kbit.methods.quantize_model import METHOD_FUNCTIONS


def test_each_method_of_the_configuration_has_its_function() -> None:
    assert METHOD_FUNCTIONS.keys() == set(METHODS)
