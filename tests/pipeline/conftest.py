"""A pipeline of all stages that ran undisturbed, its stages training numbers (fake_launch.py)."""

import pytest

from qwen3f.pipeline import commands
from tests.pipeline import toy


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline") / "P"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "LAUNCHER", toy.HERE / "fake_launch.py")
        toy.go(place)
    return place
