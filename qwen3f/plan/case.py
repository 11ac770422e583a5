"""The input of a plan: model, mesh, batch and policies, checked; and the resulting sizes on one rank."""

import dataclasses

import torch
from ml_collections import ConfigDict

from qwen3f.config import ModelConfig
from qwen3f.model import EAGER, Execution
from qwen3f.plan.hardware import Hardware
from qwen3f.train.hyper import ADAMW, AdamW
from qwen3f.train.step import check_mesh, check_recomputation
from sharding import rules
from sharding.axes import sizes_only
from sharding.layout import Layout, find_gather_dtype
from sharding.mesh import MeshShape
from sharding.pipeline.cut import Pipeline, Slices, make_slices
from sharding.pipeline.schedule import check

ONE_F_ONE_B = Pipeline()


@dataclasses.dataclass(frozen=True)
class Case:
    """What to plan. Raises UserError for sizes that do not divide, and for settings that cannot run together.

    batch_size: rows of a step over all ranks. automatic: microbatches was chosen (config.microbatches=0), so that it is
    chosen anew for a case with other policies. compute: the dtype of forward and backward pass. fsdp: whether weights
    are cut over dp, ep and cp; reduce: the dtype in which their gradients are summed, "compute" or "float32"; reshard:
    whether selective recomputation gathers them again (sharding.layout). reference: whether a frozen reference model of
    the same size is in memory too. of_answers: the stage makes rows from the model's answers; batch_size is then the
    largest number that an update can have.
    """

    model: ModelConfig
    mesh: MeshShape
    batch_size: int
    seq_len: int
    hardware: Hardware
    microbatches: int = 1
    automatic: bool = False
    compute: torch.dtype = torch.bfloat16
    hyper: AdamW = ADAMW
    fsdp: bool = True
    reduce: str = "compute"
    reshard: bool = True
    pipeline: Pipeline = ONE_F_ONE_B
    execution: Execution = EAGER
    reference: bool = False
    of_answers: bool = False

    def __post_init__(self) -> None:
        check_mesh(self.model, self.execution, Layout(sizes_only(self.mesh)))
        check_recomputation(self.model, self.execution)
        find_gather_dtype(self.reduce, self.compute)
        if self.mesh.pp > 1:
            check(self.model, self.pipeline, self.execution.compile, self.mesh.pp, self.microbatches)
        rules.check_batch(self.mesh, self.batch_size, self.seq_len, self.microbatches)

    # -- what one rank sees ------------------------------------------------------------------------------------------

    @property
    def cut(self) -> Slices:
        """Which stage and rank holds which layers."""
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
    def master(self) -> int:
        """Bytes of an element of master weights, moments and summed gradients."""
        return torch.promote_types(self.compute, torch.float32).itemsize

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
        """Tokens of the residual stream on a rank: between matrix products tp cuts the tokens (sharding.tensor)."""
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
        """Rows that a rank's experts compute, if routing is even."""
        return self.tokens * self.model.num_experts_per_tok

    @property
    def vocabulary(self) -> int:
        return self.model.vocab_size // self.mesh.tp


def make_case(
    config: ConfigDict,
    cfg: ModelConfig,
    hyper: AdamW,
    execution: Execution,
    layout: Layout,
    compute: torch.dtype,
    hardware: Hardware,
    microbatches: int,
) -> Case:
    """The Case of a configuration. The other arguments are objects already made from it; microbatches: at least 1."""
    return Case(
        model=cfg,
        mesh=layout.axes.shape,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        hardware=hardware,
        microbatches=microbatches,
        automatic=config.microbatches == 0,
        compute=compute,
        hyper=hyper,
        fsdp=layout.fsdp,
        reduce=config.fsdp.reduce,
        reshard=layout.reshard,
        pipeline=layout.pipeline,
        execution=execution,
        reference=_holds_reference(config),
    )


def _holds_reference(config: ConfigDict) -> bool:
    """Whether the stage keeps a reference model in memory: dpo, unless log-probabilities are cached; grpo with a KL."""
    of_dpo = "dpo" in config and config.dpo.get("reference_log_probs", "live") == "live"
    return of_dpo or ("grpo" in config and config.grpo.kl_coef > 0)
