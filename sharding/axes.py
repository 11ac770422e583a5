"""What a per-rank program knows of its mesh: for each named axis the size, this rank's place and the process group.

An axis of size 1 has no group and costs nothing: every collective over it is the identity.
"""

import dataclasses
import math

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sharding.mesh import AXES, MeshShape

DATA = ("dp", "ep", "cp")  # the axes over which tokens are cut, so those that FSDP shards a dense weight over
# What a weight may be sharded over as one axis. Several axes in one collective: one launch, and no copies in between.
_JOINT = (DATA, ("dp", "ep"), ("dp", "cp"), ("ep", "cp"))


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis, or several taken together, the first one slowest.

    name: "dp", or "dp_cp" for a joint axis. index: this rank's place, from 0; under LocalTensorMode a SymInt that
    stands for all ranks', so compute with it, but don't branch on it. group: the process group's name, as torch's
    functional collectives take it; None when size is 1.
    """

    name: str
    size: int = 1
    # no part of the key: SymInts have no hash, and the axes' sizes and groups already tell ranks and meshes apart
    index: int = dataclasses.field(default=0, compare=False)
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class Axes:
    """The five axes. Hashable: a block that is compiled for one mesh is cached by it."""

    pp: Axis = Axis("pp")
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
        return self.dp.index * self.ep.size + self.ep.index, self.dp.size * self.ep.size

    def over(self, *names: str) -> Axis:
        """The axis that joins the named ones; names come in the mesh's order. KeyError unless they are some of DATA.

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


def make_mesh(shape: MeshShape, device_type: str) -> DeviceMesh:
    """A DeviceMesh with all five axes, in the order of AXES. The default process group must exist."""
    return init_device_mesh(device_type, dataclasses.astuple(shape), mesh_dim_names=AXES)


def axes_of(mesh: DeviceMesh) -> Axes:
    """This rank's view of a mesh as make_mesh gives it. Every rank must call it: it creates process groups."""
    single = {}
    for dim, name in enumerate(AXES):
        if mesh.size(dim) > 1:
            single[name] = Axis(name, mesh.size(dim), mesh.get_local_rank(name), mesh.get_group(name).group_name)
    joint = [_join(mesh, single, names) for names in _JOINT if len(names) > 1 and all(n in single for n in names)]
    return Axes(**single, joint=tuple(joint))


def _join(mesh: DeviceMesh, single: dict[str, Axis], names: tuple[str, ...]) -> Axis:
    name = "_".join(names)
    index = 0
    for part in names:
        index = index * single[part].size + single[part].index
    group = mesh[names]._flatten(name).get_group()
    return Axis(name, math.prod(single[part].size for part in names), index, group.group_name)
