"""Answers questions with a trained model: one, several, those of a file, or a chat's.

    python launch.py --config experiments/generate.py --config.init_from=DIR --config.prompt="…" --config.thinking=True
    python launch.py --config experiments/generate.py --config.init_from=DIR
    python launch.py --config experiments/generate.py --config.init_from=DIR --config.input=IN.jsonl \
        --config.out=OUT.jsonl

DIR is a Hugging Face directory (Qwen3 or Qwen3-MoE), a workdir or its checkpoints/N. Answers come out on stdout as they
are written. Nothing is written, there or in a workdir, unless --config.out names a file. A model that has only been
pretrained continues text: --config.chat=False.

The second is a chat: a question a line, from the terminal or a pipe. /think and /no_think as Qwen3 has them, /reset,
/quit or the end of the input; Ctrl-C stops an answer and keeps what was said.

The third answers a file's rows, {"prompt": "…"} or {"messages": […]}, each with an "id" and any key below from chat to
stop for itself, if it likes; qwen3f/infer/batch_file.py says what OUT.jsonl gets. The same command goes on where it was
stopped.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "generate"
    config.init_from = ""
    config.prompt = ""
    config.prompts = ()  # several prompts instead of one: --config.prompts="('a', 'b')"
    config.input = ""  # a .jsonl file of rows instead. Without any of the three: a chat over stdin
    config.out = ""  # a .jsonl file for the answers, in place of stdout
    config.on_bad_row = "error"  # of config.input: error, which names file and line; or skip, which counts them
    config.chat = True  # the prompt is a user's turn in Qwen3's chat format; False: text to go on with
    config.system = ""  # system message of the chat
    config.thinking = True  # chat: let the model think first. False: never, whatever a prompt's /think says
    config.thinking_budget = config_dict.placeholder(int)  # tokens; then thinking ends with Qwen3's closing sentence
    config.max_new_tokens = 512
    # Unset: what Qwen3 recommends for a chat with or without thinking (qwen3f.infer.sampling); greedy with chat=False.
    # Each overrides its own value alone.
    config.temperature = config_dict.placeholder(float)  # 0: greedy
    config.top_k = config_dict.placeholder(int)  # 0: all
    config.top_p = config_dict.placeholder(float)
    config.min_p = config_dict.placeholder(float)
    config.presence_penalty = config_dict.placeholder(float)
    config.seed = 0
    config.stop = ()  # texts before which an answer ends: --config.stop="('###',)"
    config.batch_size = 256  # answers at a time, at most
    config.max_tokens = (
        0  # room of the key/value cache, of all answers together; 0: most of a GPU's memory, 2 GiB on a CPU
    )
    config.dtype = "auto"  # auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64
    config.device = "auto"  # auto, cpu or cuda
    return config
