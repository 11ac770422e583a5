"""What a per-rank program knows of its mesh: for each named axis the size, this rank's place and the process group.

An axis of size 1 has no group and costs nothing: every collective over it is the identity.
"""

import dataclasses
import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sharding.mesh import AXES, DATA, FSDP, ROWS, MeshShape

# What is gathered or summed over as one axis: one launch, and no copies in between. What a dense weight is cut over,
# what sums of tokens and of rows go over; and the same for experts, which ep cuts already.
_JOINT = (DATA, FSDP, ROWS, ("dr", "dp", "cp"), ("dp", "cp"))

_TP_CTAS = 64  # NCCL's own limit; measured on two H200s: 227.6 ms a step by NCCL's own choice, 220.6 by this


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis, or several taken together, the first one slowest.

    name: "dp", or "dp_cp" for a joint axis. index: this rank's place, from 0; under LocalTensorMode a SymInt that
    stands for all ranks', so compute with it, but don't branch on it. group: the process group's name, as torch's
    functional collectives take it; None when size is 1. whole: of tp, for generation, which has no gradients: between
    blocks every rank has the hidden states of all tokens, not a part of them (sharding.tensor).
    """

    name: str
    size: int = 1
    # no part of the key: SymInts have no hash, and the axes' sizes and groups already tell ranks and meshes apart
    index: int = dataclasses.field(default=0, compare=False)
    group: str | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a mesh. Hashable: a block that is compiled for one mesh is cached by it."""

    pp: Axis = Axis("pp")
    dr: Axis = Axis("dr")
    dp: Axis = Axis("dp")
    ep: Axis = Axis("ep")
    cp: Axis = Axis("cp")
    tp: Axis = Axis("tp")
    joint: tuple[Axis, ...] = ()

    def __getitem__(self, name: str) -> Axis:
        return getattr(self, name)

    @property
    def shape(self) -> MeshShape:
        return MeshShape(*(self[name].size for name in AXES))

    @property
    def rows(self) -> tuple[int, int]:
        """(this rank's place, number of places) among those that cut a batch's rows; the other axes see all rows."""
        index, size = 0, 1
        for axis in (self[name] for name in ROWS):
            index, size = index * axis.size + axis.index, size * axis.size
        return index, size

    def over(self, *names: str) -> Axis:
        """The axis that joins the named ones; names come in the mesh's order. KeyError unless they are in _JOINT.

        Axes of size 1 drop out: over("dp", "ep", "cp") is "dp" itself on a mesh that has no other.
        """
        wide = tuple(name for name in names if self[name].size > 1)
        if len(wide) <= 1:
            return self[wide[0] if wide else names[0]]
        for axis in self.joint:
            if axis.name == "_".join(wide):
                return axis
        raise KeyError(f"no joint axis of {wide}; there are {[axis.name for axis in self.joint]}")


ONE = Axes()


def sizes_only(shape: MeshShape) -> Axes:
    """The axes of a mesh that no process stands on yet: for placements and checks."""
    return Axes(**{name: Axis(name, getattr(shape, name)) for name in AXES})


def make_mesh(shape: MeshShape, device_type: str) -> DeviceMesh:
    """A DeviceMesh with all axes, of size 1 too, in the order of AXES. The default process group must exist."""
    wide = shape.tp > 1 and device_type == "cuda" and dist.get_backend() == "nccl"
    options = {"tp": _tp_options()} if wide else None
    return init_device_mesh(device_type, dataclasses.astuple(shape), mesh_dim_names=AXES, backend_override=options)


def _tp_options() -> "dist.ProcessGroupNCCL.Options":
    """More channels than NCCL takes by itself; the environment's NCCL_MIN_CTAS has the last word.

    Nothing hides most of what tp sends, so that it may take processors from computing.
    """
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = options.config.max_ctas = _TP_CTAS  # NCCL takes both or none
    options._timeout = dist.group.WORLD._get_backend(torch.device("cuda")).options._timeout
    return options


def axes_of(mesh: DeviceMesh) -> Axes:
    """This rank's view of a mesh as make_mesh gives it. Every rank must call it: it creates process groups."""
    single = {}
    for dim, name in enumerate(AXES):
        if mesh.size(dim) > 1:
            single[name] = Axis(name, mesh.size(dim), mesh.get_local_rank(name), mesh.get_group(name).group_name)
    wide = dict.fromkeys(tuple(name for name in names if name in single) for names in _JOINT)
    return Axes(**single, joint=tuple(_join(mesh, single, names) for names in wide if len(names) > 1))


def _join(mesh: DeviceMesh, single: dict[str, Axis], names: tuple[str, ...]) -> Axis:
    name = "_".join(names)
    index = 0
    for part in names:
        index = index * single[part].size + single[part].index
    group = mesh[names]._flatten(name).get_group()
    return Axis(name, math.prod(single[part].size for part in names), index, group.group_name)
