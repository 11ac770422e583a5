"""TrainState: everything that a run needs to resume, as one pytree of tensors."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen3f import params as P
from qwen3f import rng
from qwen3f.config import ModelConfig
from qwen3f.train import optimizer
from qwen3f.train.hyper import ADAMW, AdamW
from sharding.layout import ONE_DEVICE, Layout
from sharding.state import as_dtensors, init_shards


class TrainState(NamedTuple):
    """step: steps done (a step may have several updates: StepOptions.updates). tokens_seen: predicted tokens so far.
    position: index of the next example in the data order.

    seed is the source of all randomness inside a step (dropout). step, seed, tokens_seen and position are int64
    scalars on the parameters' device.
    """

    step: Tensor
    params: P.Params
    opt: optimizer.OptimizerState
    seed: Tensor
    tokens_seen: Tensor
    position: Tensor


def init_state(
    cfg: ModelConfig,
    seed: int,
    hyper: AdamW = ADAMW,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layout: Layout = ONE_DEVICE,
    mesh: DeviceMesh | None = None,
) -> TrainState:
    """The state of a new run: parameters initialised from `seed`, zero moments, counters 0.

    The values do not depend on the mesh. mesh: the mesh that `layout` describes; every leaf is then a DTensor. None:
    one device, plain tensors.
    """
    if mesh is None:
        params = P.init_params(cfg, seed, device=device, dtype=dtype)
    else:
        params = init_shards(cfg, seed, layout, device=device, dtype=dtype)
    return from_params(cfg, params, seed, hyper, layout=layout, mesh=mesh)


def from_params(
    cfg: ModelConfig,
    params: P.Params,
    seed: int,
    hyper: AdamW = ADAMW,
    *,
    layout: Layout = ONE_DEVICE,
    mesh: DeviceMesh | None = None,
) -> TrainState:
    """The state of a run that starts from given parameters.

    params: whole; on a mesh, this rank's shards (sharding.state.cut_params). hyper: decides which moments there are.
    Raises UserError as rng.check_seed.
    """
    device = next(iter(params.values())).device

    def scalar(value: int) -> Tensor:
        return torch.tensor(value, dtype=torch.int64, device=device)

    rng.check_seed(seed)
    moments = optimizer.init(hyper, P.decays(cfg), params)
    state = TrainState(scalar(0), params, moments, scalar(seed), scalar(0), scalar(0))
    return state if mesh is None else as_dtensors(state, cfg, layout, mesh)
