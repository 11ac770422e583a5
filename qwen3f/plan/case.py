"""What a plan is made for: model, mesh, batch and policies, checked; and the sizes that one rank sees of them."""

import dataclasses

import torch
from ml_collections import ConfigDict

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model import EAGER, Execution
from qwen3f.plan.hardware import Hardware, parse_hardware
from qwen3f.train import optimizer
from qwen3f.train.setup import find_compile_mode, find_dtype, find_layout
from qwen3f.train.step import check_mesh
from sharding import rules
from sharding.axes import sizes_only
from sharding.layout import Layout, find_gather_dtype
from sharding.mesh import MeshShape
from sharding.pipeline.cut import Pipeline, Slices, make_slices
from sharding.pipeline.schedule import check

ONE_F_ONE_B = Pipeline()
MASTER = 4  # bytes of a float32: master weights, moments, summed gradients


@dataclasses.dataclass(frozen=True)
class Case:
    """batch_size: rows of a step over all ranks. compute: the dtype of forward and backward. fsdp: whether weights are
    cut over dp, ep and cp; reduce: what their gradients are summed in, "compute" or "float32"; reshard: whether
    selective recomputation gathers them again (sharding.layout). pipeline and execution matter where pp > 1. Raises
    UserError for what does not divide or cannot run together.
    """

    model: ModelConfig
    mesh: MeshShape
    batch_size: int
    seq_len: int
    hardware: Hardware
    microbatches: int = 1
    compute: torch.dtype = torch.bfloat16
    hyper: optimizer.AdamW = optimizer.ADAMW
    fsdp: bool = True
    reduce: str = "compute"
    reshard: bool = True
    pipeline: Pipeline = ONE_F_ONE_B
    execution: Execution = EAGER

    def __post_init__(self) -> None:
        check_mesh(self.model, self.hyper, self.execution, Layout(sizes_only(self.mesh)))
        find_gather_dtype(self.reduce, self.compute)
        if self.mesh.pp > 1:
            check(self.model, self.pipeline, self.execution.compile, self.mesh.pp, self.microbatches)
        rules.check_batch(self.mesh, self.batch_size, self.seq_len, self.microbatches)

    # -- what one rank sees ------------------------------------------------------------------------------------------

    @property
    def cut(self) -> Slices:
        """Where the layers are."""
        if self.mesh.pp == 1:
            return Slices(self.model.num_hidden_layers)
        return make_slices(self.model, self.pipeline, self.mesh.pp)

    def layers_on(self, rank: int) -> tuple[int, ...]:
        """The layers that a rank of pp computes."""
        return tuple(layer for stage in self.cut.slices_of(rank) for layer in self.cut.layers_of(stage))

    @property
    def busiest(self) -> int:
        """The first rank of pp with the most layers."""
        return max(range(self.mesh.pp), key=lambda rank: len(self.layers_on(rank)))

    @property
    def itemsize(self) -> int:
        return self.compute.itemsize

    @property
    def rows(self) -> int:
        """Rows of a rank's micro-batch."""
        return self.batch_size // (self.mesh.dr * self.mesh.dp * self.mesh.ep * self.microbatches)

    @property
    def tokens(self) -> int:
        """Tokens of a rank's micro-batch; all ranks of tp have the same."""
        return self.rows * self.seq_len // self.mesh.cp

    @property
    def tokens_tp(self) -> int:
        """Tokens whose residual stream a rank holds: tp cuts the sequence between products."""
        return self.tokens // self.mesh.tp

    @property
    def heads(self) -> int:
        return self.model.num_attention_heads // self.mesh.tp

    @property
    def kv_heads(self) -> int:
        return max(1, self.model.num_key_value_heads // self.mesh.tp)

    @property
    def width(self) -> int:
        return self.model.intermediate_size // self.mesh.tp

    @property
    def expert_width(self) -> int:
        return self.model.moe_intermediate_size // self.mesh.tp

    @property
    def expert_rows(self) -> int:
        """Rows that a rank's experts take, if routing is even."""
        return self.tokens * self.model.num_experts_per_tok

    @property
    def vocabulary(self) -> int:
        return self.model.vocab_size // self.mesh.tp


def from_config(config: ConfigDict) -> Case:
    """Raises UserError, naming key and value, for what cannot run on any device."""
    for key in ("batch_size", "microbatches", "seq_len"):
        if config[key] < 1:
            raise UserError(f"config.{key} must be at least 1, got {config[key]}")
    cuda = torch.device("cuda")
    cfg, compute = ModelConfig.from_dict(config.model.to_dict()), find_dtype(config.dtype, cuda)
    layout = find_layout(config, None, compute)
    return Case(
        model=cfg,
        mesh=layout.axes.shape,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        hardware=parse_hardware(config.hardware),
        microbatches=config.microbatches,
        compute=compute,
        hyper=optimizer.make(**config.optimizer.to_dict()),
        fsdp=config.fsdp.enabled,
        reduce=config.fsdp.reduce,
        reshard=config.fsdp.reshard,
        pipeline=layout.pipeline,
        execution=Execution(find_compile_mode(config.compile, cuda), config.attention),
    )
