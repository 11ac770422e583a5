"""Samples answers to a task's training questions: right answers become chats, or the best and worst a pair for DPO.

    python launch.py --config experiments/rejection_sample.py --config.init_from=W2 --config.out=DIR \
        --config.data.kinds=number_theory,sequence --config.data.difficulties=1
    python launch.py --config experiments/sft_fusion.py:nano --config.init_from=W2 --workdir W3 \
        --config.data.mixture=chats@DIR=0.7,reasoning-plain=0.3

    python launch.py --config experiments/rejection_sample.py --config.init_from=W2 --config.out=DIR \
        --config.rows=pairs --config.samples=8 --config.temperature=1.0
    python launch.py --config experiments/dpo.py:nano --config.init_from=W2 --workdir W4 \
        --config.data.mixture=pairs@DIR

W2 is a workdir, its checkpoints/N or a Hugging Face directory of a model that thinks. DIR gets samples.jsonl and
rejection_summary.json. Each row of samples.jsonl has messages (a pair has chosen and rejected messages), with the
thought under reasoning_content. The summary has the settings and counts. The same command again resumes where it
stopped; a larger --config.questions adds answers to DIR. --workdir has no effect.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "rejection_sample"
    config.init_from = ""
    config.chat_template = ""  # hybrid or thinking-2507; "": recognise it by the template stored with the weights
    config.out = ""  # directory to write; it must hold nothing else
    config.task = "reasoning"  # the task that asks the questions and judges the answers
    config.questions = 1000  # answer this many questions of the training split, the first ones; 0: all
    config.rows = "chats"  # what to write: chats (right answers), or pairs (best and worst answer of a question)
    config.samples = 4  # answers to each question
    config.keep = 2  # rows=chats: keep at most this many different right answers of a question, the first; 0: all
    config.data = ConfigDict()  # which questions; the same keys as in fine-tuning
    config.data.kinds = ""  # kinds of generated problems, such as arithmetic,logic; "": all
    config.data.difficulties = ""  # difficulties of generated problems, such as 1,2; "": all
    config.data.problems = 32_768  # number of problems to generate, training and held-out together
    config.data.problem_seed = 0
    config.max_new_tokens = 512  # a longer answer is cut off and left out
    config.temperature = 0.6  # Qwen3's for thinking
    config.seed = 0
    config.batch_size = 64  # answers at a time
    config.device = "auto"  # auto, cpu or cuda
    config.dtype = "auto"  # auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64
    return config
