"""A pipeline of all stages that ran without interruption. fake_launch.py stands in for training."""

import pytest

from tests.pipeline import toy


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return toy.made(tmp_path_factory.mktemp("pipeline") / "P")
