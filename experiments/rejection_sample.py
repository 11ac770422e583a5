"""Questions of a task's training split answered by a model; the right answers become chats to fine-tune on, or the
best and the worst one a pair for DPO.

    python launch.py --config experiments/rejection_sample.py --config.init_from=W2 --config.out=DIR \
        --config.data.kinds=number_theory,sequence --config.data.difficulties=1
    python launch.py --config experiments/sft_fusion.py:nano --config.init_from=W2 --workdir W3 \
        --config.data.mixture=chats@DIR=0.7,reasoning-plain=0.3

    python launch.py --config experiments/rejection_sample.py --config.init_from=W2 --config.out=DIR \
        --config.rows=pairs --config.samples=8 --config.temperature=1.0
    python launch.py --config experiments/dpo.py:nano --config.init_from=W2 --workdir W4 \
        --config.data.mixture=pairs@DIR

W2 is a workdir, its checkpoints/N or a Hugging Face directory of a model that thinks. DIR gets samples.jsonl, rows of
messages (of a pair: chosen and rejected ones) with the thought under reasoning_content, and rejection_summary.json with
the settings and counts. The same command again goes on where it stopped; a larger --config.questions adds to what is
there. The workdir is not used.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "rejection_sample"
    config.init_from = ""
    config.chat_template = ""  # hybrid or thinking-2507; "": that of the template beside the weights
    config.out = ""  # a directory of its own
    config.task = "reasoning"  # whose questions are asked, and which judges the answers
    config.questions = 1000  # so many of the training split, the first ones; 0: all
    config.rows = "chats"  # what is kept: chats, right answers; or pairs, a question's best and worst answer
    config.samples = 4  # answers to each question
    config.keep = 2  # right answers kept of each question, at most, the first ones that differ; 0: all; of chats alone
    config.data = ConfigDict()  # which questions; as in fine-tuning
    config.data.kinds = ""  # of generated problems, arithmetic,logic; "": all
    config.data.difficulties = ""  # of generated problems, 1,2; "": all
    config.data.problems = 32_768  # that are generated, both splits together
    config.data.problem_seed = 0
    config.max_new_tokens = 512  # an answer that has not ended there is left out
    config.temperature = 0.6  # Qwen3's for thinking
    config.seed = 0
    config.batch_size = 64  # answers at a time
    config.device = "auto"  # auto, cpu or cuda
    config.dtype = "auto"  # auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64
    return config
