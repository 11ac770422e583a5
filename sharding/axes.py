"""What one rank knows about its mesh: for each named axis its size, this rank's index on it and the process group.

An axis of size 1 has no group and costs nothing: every collective over it is the identity.
"""

import dataclasses
import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sharding.mesh import AXES, DATA, FSDP, ROWS, MeshShape

# Sets of axes that collectives treat as one axis, so that one launch does the work without copies in between. DATA:
# sums over tokens. FSDP: shards of dense weights. ROWS: sums over rows. The last two are DATA and FSDP for experts'
# weights, which ep cuts already.
_JOINT = (DATA, FSDP, ROWS, ("dr", "dp", "cp"), ("dp", "cp"))

# thread blocks that NCCL uses for tp, its maximum; on two H200s a step takes 220.6 ms so, 227.6 with NCCL's default
_TP_CTAS = 64


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis, or several joined into one; of joined axes the first one varies slowest.

    name: "dp", or "dp_cp" for a joint axis. index: this rank's place on the axis, from 0; under LocalTensorMode it is a
    SymInt that stands for the places of all ranks, so compute with it, but don't branch on it. group: the process
    group's name, as torch's functional collectives take it; None when size is 1. whole: True only for tp in generation,
    which has no gradients: between blocks every rank holds the hidden states of all tokens, not only of its part
    (sharding.tensor).
    """

    name: str
    size: int = 1
    # not compared or hashed: SymInts have no hash, and sizes and groups already tell ranks and meshes apart
    index: int = dataclasses.field(default=0, compare=False)
    group: str | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a mesh. Hashable, because compiled blocks are cached by it."""

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
        """(this rank's index, number of parts) of a batch's rows, which dr, dp and ep cut. Other axes share rows."""
        index, size = 0, 1
        for axis in (self[name] for name in ROWS):
            index, size = index * axis.size + axis.index, size * axis.size
        return index, size

    def over(self, *names: str) -> Axis:
        """The axis that joins the named ones; give names in the mesh's order. KeyError for a set that is not in _JOINT.

        Axes of size 1 drop out: over("dp", "ep", "cp") is the axis "dp" where ep and cp have size 1.
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
    """The axes of a mesh without processes (every index 0, no groups): for placements and checks."""
    return Axes(**{name: Axis(name, getattr(shape, name)) for name in AXES})


def make_mesh(shape: MeshShape, device_type: str) -> DeviceMesh:
    """A DeviceMesh with all axes in the order of AXES, also those of size 1. The default process group must exist."""
    wide = shape.tp > 1 and device_type == "cuda" and dist.get_backend() == "nccl"
    options = {"tp": _tp_options()} if wide else None
    return init_device_mesh(device_type, dataclasses.astuple(shape), mesh_dim_names=AXES, backend_override=options)


def _tp_options() -> "dist.ProcessGroupNCCL.Options":
    """Let NCCL use more thread blocks than its default. The environment variable NCCL_MIN_CTAS overrides this.

    Most communication of tp does not overlap with computation, so it can take the GPU's multiprocessors.
    """
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = options.config.max_ctas = _TP_CTAS  # NCCL takes both or none
    options._timeout = dist.group.WORLD._get_backend(torch.device("cuda")).options._timeout
    return options


def axes_of(mesh: DeviceMesh) -> Axes:
    """This rank's view of a mesh from make_mesh. Every rank must call it, because it creates process groups."""
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
