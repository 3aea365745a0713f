"""Every method that an experiment can name is there."""

from __future__ import annotations

import pytest

from kbit.methods import _find_method
from kbit.quantconfig import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_each_method_of_the_configuration_has_its_function(name: str) -> None:
    assert callable(_find_method(name))
