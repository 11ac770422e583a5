"""`--config.plan=True`: print the plan of the mesh, and draw it in the workdir; no device is needed or used."""

from pathlib import Path

from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.plan.config import from_config
from qwen3f.plan.fit import smallest_changes
from qwen3f.plan.make import by_policy
from qwen3f.plan.picture import mesh_png, timeline_png
from qwen3f.plan.text import render


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> None:
    """Print the plan of a configuration, and write its pictures to workdir/plan.

    Raises UserError, before it writes anything, for a mesh on which the configuration cannot run.
    """
    setup = from_config(config)
    policies = by_policy(setup)
    plan = policies[setup.model.gradient_checkpointing]
    print(render(plan, policies, None if plan.fits else smallest_changes(config)), end="")
    pictures = {"mesh.png": mesh_png(plan)}
    if setup.mesh.pp > 1:
        pictures["timeline.png"] = timeline_png(plan)
    for name, content in pictures.items():
        try:
            write_atomically(path := workdir / "plan" / name, content)
        except OSError as error:
            raise UserError(
                f"--workdir={workdir}: the pictures cannot be written there ({error.strerror or error}); choose another"
            ) from error
        print(path)
