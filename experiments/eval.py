"""Runs benchmarks on a model; scores are those of EleutherAI's lm-evaluation-harness and of lmms-eval.

    python launch.py --config experiments/eval.py --config.init_from=W --config.benchmarks=gsm8k,mmlu \
        --config.data.root=DIR --workdir E

W is a workdir, its checkpoints/N or a Hugging Face directory. E gets results.json, with every question, prompt and
answer, and results.md, a table with 95% intervals and the settings that affect the scores. The same command again
resumes where it stopped. DIR holds local copies of the data sets, each in a directory named after its benchmark. A
benchmark can also name its own directory: gsm8k@DIR. Without a local copy the data comes from the Hub.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "eval"
    config.init_from = ""
    # mmlu, gsm8k, math, humaneval, arc_challenge, hellaswag, winogrande, triviaqa; vqav2, textvqa, docvqa, chartqa;
    # reasoning and procedures, which are generated. Several with commas; each with @DIR for a local copy.
    config.benchmarks = ""
    config.data = ConfigDict()
    config.data.root = ""  # directory of the local copies
    config.data.kinds = ""  # kinds of generated problems, such as arithmetic,logic; "": all
    config.data.difficulties = ""  # difficulties of generated problems, such as 1,2; "": all
    config.data.problems = 32_768  # number of problems to generate, training and held-out together
    config.data.problem_seed = 0
    config.limit = 0  # use only this many questions of each subject, the first ones; 0: all
    config.shots = config_dict.placeholder(int)  # examples before each question; default: the benchmark's own number
    config.prompt = "raw"  # or chat
    # For prompt=chat: hybrid, instruct-2507, thinking-2507 or coder; "": recognise it by the template stored with W.
    config.chat_template = ""
    # For prompt=chat: True lets the model think first; False adds an empty thinking block, as enable_thinking=False.
    config.thinking = False
    config.max_new_tokens = 0  # tokens of an answer, at most; 0: the benchmark's own number
    config.samples = 1  # answers to each question; programs get pass@k, other benchmarks the mean over the answers
    config.temperature = 0.0  # 0: greedy
    config.top_p = 1.0
    config.seed = 0
    config.min_pixels = 65_536  # images are scaled to have at least this many pixels,
    config.max_pixels = 16_777_216  # and at most this many
    config.metrics = "harness"  # or official: the authors' definition, where it differs (vqav2, docvqa)
    config.mesh = ""  # dp4: four ranks share the questions; each has the whole model
    config.batch_tokens = 0  # tokens in a batch; 0: estimated from the free memory. Results do not depend on it
    config.chunk = 256  # a rank saves its results after this many questions
    config.device = "auto"  # auto, cpu or cuda
    config.dtype = "auto"  # auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64
    config.attention = "auto"  # auto, sdpa, flash or reference
    config.collective_timeout = 600.0  # seconds that ranks on CUDA wait for another one in a collective
    return config
