"""Answers a prompt with a trained model; the answer comes out on stdout as it is written.

    python launch.py --config experiments/generate.py --config.init_from=DIR --config.prompt="…" --config.thinking=True

DIR is a Hugging Face directory (Qwen3 or Qwen3-VL, dense or MoE), a workdir or its checkpoints/N. A model with a vision
tower is asked about --config.images=a.png,b.jpg and --config.video=DIR. Nothing is written, there or in a workdir,
unless --config.out names a file. A model that has only been pretrained continues text: --config.chat=False.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "generate"
    config.init_from = ""
    config.prompt = ""
    config.prompts = ()  # several prompts instead of one, answered as one batch: --config.prompts="('a', 'b')"
    config.images = ""  # files that the prompts ask about, with commas between: a.png,b.jpg
    config.video = ""  # a directory of frames, in the order of their names, or a GIF
    config.video_fps = config_dict.placeholder(float)  # how fast its frames were taken; a GIF says so itself
    config.min_pixels = 65_536  # images are scaled to lie between
    config.max_pixels = 16_777_216
    config.chat = True  # the prompt is a user's turn in Qwen3's chat format; False: text to go on with
    config.system = ""  # system message of the chat
    # chat: whether the model thinks first; False: the empty thinking block of enable_thinking=False. Unset: as its
    # template does by itself; a model that never thinks, or always, can do nothing else.
    config.thinking = config_dict.placeholder(bool)
    config.chat_template = ""  # hybrid, instruct-2507, thinking-2507 or coder; "": that of the template in DIR
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
    config.dtype = "auto"  # auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64
    config.device = "auto"  # auto, cpu or cuda
    config.out = ""  # a .jsonl file to append to: a line {"prompt", "answer", "tokens", "stopped"} for each prompt
    return config
