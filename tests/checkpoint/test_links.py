"""Checkpoints behind links: those on another file system are moved aside too; deleting a link keeps its target."""

import errno
import os
from pathlib import Path

import pytest
import torch

from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.commit import CheckpointWriteError
from qwen3f.errors import UserError

STATE = {"w": torch.arange(3.0)}


def saved(directory, *steps, keep=0):
    with Checkpointer(directory, 1, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, STATE, {"step": step})
    return Checkpointer(directory, 1, keep)


@pytest.fixture
def mounts(monkeypatch):
    """mounts([a, b]): rename treats these directories as file systems of their own."""
    places: list[Path] = []

    def device(path):
        real = path.parent.resolve() / path.name
        return max((str(place) for place in places if real.is_relative_to(place)), default="")

    rename = Path.rename

    def checked(self, target):
        if device(self) != device(Path(target)):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self), None, str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", checked)
    return places.extend


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_linked_directory_on_another_file_system(tmp_path, mounts):
    """Checkpoints can't move to another file system, beside the link. So they go beside the link's target."""
    (tmp_path / "scratch" / "run7").mkdir(parents=True)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "checkpoints").symlink_to(tmp_path / "scratch" / "run7")
    checkpoints = saved(tmp_path / "w" / "checkpoints", 1, 2, 3)
    mounts([tmp_path / "scratch"])
    aside = checkpoints.set_aside(1)
    assert aside == tmp_path / "scratch" / "checkpoints.aside1"
    assert (names(aside), checkpoints.steps()) == (["2", "3"], [1])
    assert names(tmp_path / "w") == ["checkpoints"]  # no empty directory is left
    assert Checkpointer(aside, 1, 0).restore(STATE, 3)[1] == {"step": 3}
    saved(tmp_path / "w" / "checkpoints", 2)
    assert checkpoints.set_aside(1) == tmp_path / "scratch" / "checkpoints.aside2"


def test_a_linked_directory_that_is_a_file_system(tmp_path, mounts):
    """No place beside the link or beside its target is on the same file system, so they go into the target."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "checkpoints").symlink_to(tmp_path / "scratch")
    checkpoints = saved(tmp_path / "w" / "checkpoints", 1, 2)
    mounts([tmp_path / "scratch"])
    aside = checkpoints.set_aside(1)
    assert aside == tmp_path / "scratch" / "checkpoints.aside1"
    assert (names(aside), checkpoints.steps()) == (["2"], [1])
    assert (names(tmp_path), names(tmp_path / "w")) == (["scratch", "w"], ["checkpoints"])
    saved(tmp_path / "w" / "checkpoints", 2)  # what lies within does not disturb a save
    assert checkpoints.steps() == [1, 2]


def test_a_failure_leaves_no_empty_directory(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)

    def rename(self, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", rename)
    for _ in range(2):
        with pytest.raises(CheckpointWriteError, match=r"after step 1 could not be moved out of .*Input/output error"):
            checkpoints.set_aside(1)
    assert names(tmp_path) == ["checkpoints"]
    assert checkpoints.steps() == [1, 2]


def test_a_real_other_file_system(tmp_path):
    """This runs only where the machine has one."""
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    place = other / f"qwen3f-test-{os.getpid()}"
    place.mkdir()
    try:
        (place / "run").mkdir()
        (tmp_path / "checkpoints").symlink_to(place / "run")
        checkpoints = saved(tmp_path / "checkpoints", 1, 2)
        aside = checkpoints.set_aside(1)
        assert (aside.parent, names(aside), checkpoints.steps()) == (place, ["2"], [1])
        assert names(tmp_path) == ["checkpoints"]
    finally:
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        place.rmdir()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_linked_old_checkpoint_is_given_up_like_any_other(keep, tmp_path):
    """Its link is removed, what it leads to stays; the saves go on, in this process and in the next."""
    directory, archive = tmp_path / "checkpoints", tmp_path / "archive"
    saved(directory, 1, 2)
    (directory / "1").rename(archive)
    (directory / "1").symlink_to(archive)
    assert Checkpointer(directory, 1, 0).restore(STATE, 1)[1] == {"step": 1}
    with Checkpointer(directory, 1, keep) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, STATE, {"step": step})
            checkpoints.wait()
    saved(directory, 5, keep=keep)
    assert names(directory) == [str(step) for step in range(6 - keep, 6)]
    assert sorted(path.name for path in archive.iterdir()) == ["manifest.json", "meta", "state"]


def test_a_link_that_a_killed_process_left_half_deleted(tmp_path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "mine").touch()
    (tmp_path / "checkpoints").mkdir()
    for name in ("1.deleted", "2.writing"):
        (tmp_path / "checkpoints" / name).symlink_to(tmp_path / "archive")
    saved(tmp_path / "checkpoints", 3)
    assert names(tmp_path / "checkpoints") == ["3"]
    assert names(tmp_path / "archive") == ["mine"]


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="checkpoints is a file, or a link to nothing: checkpoints need a directory"):
        Checkpointer(tmp_path / "checkpoints", 1, 0)
