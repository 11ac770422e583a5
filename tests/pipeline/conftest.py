"""A pipeline of all stages that ran undisturbed, its stages training numbers (fake_launch.py)."""

import pytest

from tests.pipeline import toy


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return toy.made(tmp_path_factory.mktemp("pipeline") / "P")
