"""Benchmarks asked of a model; scores as EleutherAI's lm-evaluation-harness and lmms-eval give them.

    python launch.py --config experiments/eval.py --config.init_from=W --config.benchmarks=gsm8k,mmlu \
        --config.data.root=DIR --workdir E

W is a workdir, its checkpoints/N or a Hugging Face directory. E gets results.json, with every question, prompt and
answer, and results.md, a table with intervals of 95% and the settings that decide the numbers. The same command again
goes on where it stopped. Local copies of data sets lie in DIR, a directory each of the benchmark's name, or are named
with it: gsm8k@DIR. Without either they come from the Hub.
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
    config.data.root = ""  # of the local copies
    config.data.kinds = ""  # of generated problems, arithmetic,logic; "": all
    config.data.difficulties = ""  # of generated problems, 1,2; "": all
    config.data.problems = 32_768  # that are generated, both splits together
    config.data.problem_seed = 0
    config.limit = 0  # questions of each subject, the first ones; 0: all
    config.shots = config_dict.placeholder(int)  # examples before each question; default: the benchmark's own number
    config.prompt = "raw"  # or chat
    config.chat_template = ""  # chat: hybrid, instruct-2507, thinking-2507 or coder; "": that of the template beside W
    config.thinking = False  # chat: let the model think first; False: the empty thinking block of enable_thinking=False
    config.max_new_tokens = 0  # of an answer; 0: the benchmark's own number
    config.samples = 1  # answers to each question: for pass@k of programs, of others the mean counts
    config.temperature = 0.0  # 0: greedy
    config.top_p = 1.0
    config.seed = 0
    config.min_pixels = 65_536  # images are scaled to lie between
    config.max_pixels = 16_777_216
    config.metrics = "harness"  # or official: by the authors' definition, where that is another (vqav2, docvqa)
    config.mesh = ""  # dp4: four ranks share out the questions; each has the whole model
    config.batch_tokens = 0  # tokens at a time; 0: as many as memory lets one expect. No result depends on it
    config.chunk = 256  # questions of a rank between two writes of what is done
    config.device = "auto"  # auto, cpu or cuda
    config.dtype = "auto"  # auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64
    config.attention = "auto"  # auto, sdpa, flash or reference
    config.collective_timeout = 600.0  # seconds that ranks on CUDA wait for another one in a collective
    return config
