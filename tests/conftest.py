"""Where kernels run, a tiny corpus, and configurations of runs of a tiny model on it.

Without a GPU, kernels can run in Triton's interpreter; that is decided when triton is first imported.
"""

import json
import os
import random

# Tensors are tiny: with two threads on a loaded machine a test file took six times as long. Child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from qwen3f.stages.configs import pretrain_config

GPU_SECONDS = 120  # the limit of a test on a GPU; most of it is compilation
# No deadline for an example: its time depends mostly on the machine, which other workers use too.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

WORDS = "the cat sat on a mat and looked at red green blue birds in trees while rain fell softly"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(GPU_SECONDS))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    words = WORDS.split()
    rand = random.Random(0)
    with (root / "text.jsonl").open("w") as file:
        for _ in range(400):
            text = " ".join(rand.choice(words) for _ in range(rand.randint(5, 120)))
            file.write(json.dumps({"text": text}) + "\n")
    return root


@pytest.fixture
def make(corpus, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"

    def config(**changes):
        c = pretrain_config("nano")
        c.device = "cpu"
        c.data.mixture = f"files@{corpus}"
        c.data.cache = str(cache)
        c.model.update(vocab_size=320, num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=16)
        c.update(steps=20, batch_size=4, seq_len=32, log_every=5)
        c.schedule.update(peak_lr=1e-2, warmup=0.1)
        c.eval.update(every=10, batch_size=4, max_docs=3)
        c.checkpoint.update(every=10)
        c.sample.update(tokens=4)
        c.update_from_flattened_dict(changes)
        return c

    return config
