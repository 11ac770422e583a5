"""Modules that ranks of tests need. The server that forks the ranks imports them once, so that no rank has to."""

# ruff: noqa: F401
import pytest
import torch._dynamo.backends.debugging
import torch._inductor.compile_fx
import torch.distributed.pipelining
import torch.utils.tensorboard

import tests.sharding.steps
import tests.train.runs
from qwen3f.checkpoint import orbax
from qwen3f.train import loop

orbax.import_jax_and_orbax()
