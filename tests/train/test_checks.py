"""Wrong values are refused by their keys, before torch is imported."""

import json
import subprocess
import sys
import typing

import pytest
from ml_collections import ConfigDict

from qwen3f import model
from qwen3f.checkpoint import checkpointer
from qwen3f.data import corpus
from qwen3f.data.chat import corpus as chats
from qwen3f.data.chat import samples
from qwen3f.data.packing.best_fit import LongDocuments
from qwen3f.data.sources.adapters.rows import OnBadRow
from qwen3f.interop import export
from qwen3f.model import attention
from qwen3f.rl import advantages, correction, policy
from qwen3f.stages import dpo
from qwen3f.train import checks, choices, logger, schedule
from sharding.pipeline import cut

WRONG = [
    ({"schedule.peak_lr": -1.0}, "config.schedule.peak_lr must be at least 0, got -1.0"),
    ({"schedule.peak_lr": float("nan")}, "config.schedule.peak_lr=nan: write a finite number"),
    ({"schedule.min_ratio": 2.0}, "config.schedule.min_ratio must be a share from 0 to 1"),
    ({"schedule.warmup": 20000.0}, "config.schedule.warmup=20000 take more than config.steps=1000"),
    ({"schedule.warmup": 1000.5}, "config.schedule.warmup=1000.5 take more than config.steps=1000"),  # half a step over
    ({"schedule.kind": "linear"}, "config.schedule.kind='linear' is unknown; use one of cosine, wsd, constant"),
    ({"optimizer.kind": "sgd"}, "config.optimizer.kind='sgd' is unknown; use one of adamw, muon"),
    ({"optimizer.b2": 1.5}, "optimizer.b2 must be in [0, 1)"),
    ({"optimizer.weight_decay": float("inf")}, "config.optimizer.weight_decay=inf: write a finite number"),
    ({"steps": 0}, "config.steps must be at least 1"),
    ({"steps": 10**30}, "write a finite number below 2^63"),
    ({"batch_size": 10**400}, "config.batch_size=1000"),
    ({"optimizer.iterations": -(10**400)}, "config.optimizer.iterations=-1000"),
    ({"watchdog": 1e10}, "config.watchdog must be at most 1,000,000 seconds"),
    ({"checkpoint.timeout": 1e11}, "config.checkpoint.timeout must be at most 1,000,000 seconds"),
    ({"seed": -1}, "config.seed must be at least 0"),
    ({"microbatches": 3}, "config.batch_size=8 cannot be cut into config.microbatches=3"),
    ({"mesh": "db8"}, "did you mean 'dp'"),
    ({"mesh": "tp3"}, "config.mesh=tp3: tp=3 does not divide the model's 2 heads of queries, 2 of keys"),
    ({"mesh": "tp16"}, "write in config.mesh tp2 (tp may be 1, 2)"),
    ({"model.head_dim": 7}, "model.head_dim must be even"),
    ({"seq_len": 10**6}, "config.seq_len=1000000 exceeds config.model.max_position_embeddings=2048"),
    ({"init_from": "/no/such"}, "config.init_from=/no/such: there is no /no/such"),
    ({"device": "tpu"}, "config.device='tpu'"),
    ({"dtype": "int8"}, "config.dtype='int8'"),
    ({"compile": "all"}, "config.compile='all'"),
    ({"wandb": "on"}, "config.wandb='on'"),
    ({"data.packing": "x"}, "config.data.packing='x' is unknown; use one of concat, best_fit"),
    ({"data.holdout": 2.0}, "config.data.holdout must be a share"),
    ({"checkpoint.backend": "x"}, "config.checkpoint.backend='x'"),
    ({"resume": -3}, "config.resume must be at least 0"),
    (
        {"steps": 100, "checkpoint.keep_best": 1, "eval.every": 30, "checkpoint.every": 40},
        "no step before the last of config.steps=100 both measures and saves; write config.checkpoint.every=30",
    ),
    ({"batch_size": 10**12}, "config.batch_size=1000000000000: write a finite number below 2^32"),
    ({"batch_size": 2**15, "microbatches": 2**15}, "config.microbatches=32768 must be at most 4096"),
    ({"model.num_hidden_layers": 10**9}, "config.model.num_experts: num_hidden_layers × num_experts is 1,000,000,000"),
    (
        {
            "model.vision_enabled": True,
            "model.vocab_size": 151_936,
            "model.mrope_section": (16, 8, 8),
            "model.vision_num_hidden_layers": 10**9,
        },
        "config.model.num_experts: vision_num_hidden_layers is 1,000,000,000, over the limit of 262,144 tensors",
    ),
    ({"model.num_attention_heads": 10**9, "mesh": "tp3"}, "write in config.mesh tp2"),
    ({"mesh": "dp100000000000", "fsdp.shard_size": 3}, "'dp100000000000' is not an axis and a size"),
    ({"mesh": "dp999999999", "fsdp.shard_size": 2}, "999,999,999 devices are more than 1,048,576; write lower sizes"),
    ({"pipeline.layers": -1}, "config.pipeline.layers must be at least 0"),
]
TOOLS = {"generate": "init_from", "export_hf": "init_from", "inspect": "path", "rejection_sample": "init_from"}
PROGRAM = """
import json, sys
from pathlib import Path
from qwen3f import cli
from qwen3f.errors import UserError
for experiment, changes in json.load(sys.stdin):
    config = cli.load_experiment(experiment)
    config.update_from_flattened_dict(changes)
    try:
        cli.run_stage(config, Path("unused"), False)
    except UserError as error:
        print(json.dumps([str(error), "torch" in sys.modules]))
"""


def test_wrong_values_are_refused_before_torch_is_imported():
    asked = [("experiments/pretrain_s1.py:nano", changes) for changes, _ in WRONG]
    asked += [(f"experiments/{name}.py", {}) for name in TOOLS]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(asked)
    for (words, torch), wanted in zip(said, [words for _, words in WRONG] + list(TOOLS.values())):
        assert wanted in words
        assert not torch, words


@pytest.mark.parametrize(
    "key, words",
    [
        ("dtype", ("auto", *choices.DTYPES)),
        ("compile", ("auto", *model.execution.COMPILE_MODES)),
        ("attention", (*attention.BACKENDS, "invariant")),
        ("wandb", logger.WANDB_MODES),
        ("pipeline.schedule", cut.SCHEDULES),
        ("schedule.kind", schedule.KINDS),
        ("checkpoint.backend", checkpointer.BACKENDS),
        ("backend", checkpointer.BACKENDS),
        ("data.packing", corpus.PACKINGS),
        ("data.long_documents", typing.get_args(LongDocuments)[:2]),
        ("data.turns", samples.TURNS),
        ("data.long_chats", chats.LONG_CHATS),
        ("data.on_bad_row", typing.get_args(OnBadRow)),
        ("advantages.baseline", advantages.BASELINES),
        ("advantages.scale", advantages.SCALES),
        ("advantages.combine", advantages.COMBINE),
        ("grpo.loss", policy.LOSSES),
        ("grpo.kl", policy.KINDS_OF_KL),
        ("rollout.correction", correction.MODES),
        ("dpo.loss", dpo.LOSSES),
    ],
)
def test_words_are_those_of_the_modules(key, words):
    assert set(checks.CHOICES[key]) == set(words)


@pytest.mark.parametrize(
    "written, updates, steps",
    [(0.29, 1, 29), (0.57, 1, 57), (0.145, 2, 29), (0.999, 1, 99), (0.0, 1, 0), (1e-5, 1, 0), (1, 2, 2), (29.5, 1, 29)],
)
def test_a_share_of_the_steps_is_what_was_written(written, updates, steps):
    assert checks.steps_of(ConfigDict({"steps": 100, "warmup": written}), "warmup", updates) == steps


def test_words_of_a_tool_are_those_of_its_module():
    assert checks.CHOICES_OF["export_hf"]["dtype"] == tuple(export.DTYPES)
    assert set(checks.CHOICES_OF["eval"]["attention"]) == set(attention.BACKENDS)  # invariant: only to train
