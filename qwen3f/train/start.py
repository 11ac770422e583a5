"""What a run begins with: its corpus, and its state (resumed, taken from another run, or fresh)."""

import dataclasses
from pathlib import Path

import torch

from qwen3f.config import ModelConfig
from qwen3f.data.corpus import Corpus, prepare
from qwen3f.errors import UserError
from qwen3f.params import Params, check_params
from qwen3f.train import workdir as W
from qwen3f.train.checkpoint import Checkpointer
from qwen3f.train.plan import Plan
from qwen3f.train.state import TrainState, from_params, init_state


def open_corpus(plan: Plan, workdir: Path, progress: bool) -> Corpus:
    """The corpus, with the run's own tokenizer if it has one, else the one of `init_from`, else as configured."""
    data = plan.data
    places = [workdir]
    if plan.config.init_from:
        places.append(W.split_source(plan.config.init_from)[0])
    if not data.tokenizer:
        known = [place / W.TOKENIZER for place in places if (place / W.TOKENIZER).exists()]
        data = dataclasses.replace(data, tokenizer=str(known[0]) if known else "")
    corpus = prepare(data, plan.config.seq_len, progress)
    if corpus.tokenizer.vocab_size != plan.model.vocab_size:
        raise UserError(
            f"the tokenizer {corpus.tokenizer.path} has {corpus.tokenizer.vocab_size} tokens and the model "
            f"{plan.model.vocab_size}; write --config.model.vocab_size={corpus.tokenizer.vocab_size} or another "
            "--config.data.tokenizer"
        )
    return corpus


def starting_state(plan: Plan, checkpoints: Checkpointer) -> TrainState:
    """The state to go on from: config.resume's or the last checkpoint, else init_from's weights, else fresh.

    Checkpoints later than config.resume are moved aside, never deleted.
    """
    resume = plan.config.resume
    if resume is not None or checkpoints.latest() is not None:
        state, _ = checkpoints.restore(_like(plan.model, plan.device), resume)
        if resume is not None and (aside := checkpoints.set_aside(resume)):
            print(f"checkpoints after step {resume} were moved to {aside}", flush=True)
        return state
    if plan.config.init_from:
        return from_params(load_weights(plan.config.init_from, plan.model, plan.device), plan.config.seed)
    return init_state(plan.model, plan.config.seed, device=plan.device)


def load_weights(source: str, cfg: ModelConfig, device: torch.device) -> Params:
    """The parameters that another run saved: source is its workdir (last checkpoint) or its checkpoints/N."""
    workdir, step = W.split_source(source)
    with Checkpointer(workdir / W.CHECKPOINTS, every=0, keep=0) as checkpoints:
        state, _ = checkpoints.restore(_like(cfg, torch.device("cpu")), step)
    check_params(cfg, state.params)
    return {path: leaf.to(device) for path, leaf in state.params.items()}


def _like(cfg: ModelConfig, device: torch.device) -> TrainState:
    """A state's shapes, dtypes and device."""
    return init_state(cfg, 0, device=device)
