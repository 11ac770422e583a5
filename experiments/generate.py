"""Answers questions with a trained model: one question, several, a file of them, or a chat.

    python launch.py --config experiments/generate.py --config.init_from=DIR --config.prompt="…" --config.thinking=True
    python launch.py --config experiments/generate.py --config.init_from=DIR
    python launch.py --config experiments/generate.py --config.init_from=DIR --config.input=IN.jsonl \
        --config.out=OUT.jsonl

DIR is a Hugging Face directory (Qwen3 or Qwen3-VL, dense or MoE), a workdir or its checkpoints/N. Answers appear on
stdout token by token. No file is written unless --config.out names one. A model that was only pretrained continues
text: write --config.chat=False. A model with a vision tower also takes --config.images=a.png,b.jpg and
--config.video=DIR, together with --config.prompt or --config.prompts. --config.mesh=tp2 splits the model over two
devices.

Sampling defaults are those that Qwen3 recommends. With thinking: temperature 0.6, top_p 0.95, top_k 20. Without:
temperature 0.7, top_p 0.8, top_k 20 and a presence penalty of 1.5. A temperature of 0 keeps the penalty, so greedy
decoding without thinking also needs --config.presence_penalty=0.

The second command is a chat: one question per line, from the terminal or a pipe. /think and /no_think switch thinking
as in Qwen3, /reset starts a new chat, /quit or the end of the input ends it. Ctrl-C stops an answer; the part that was
written stays in the chat.

The third command answers the rows of a file, {"prompt": "…"} or {"messages": […]}. A row may have an "id" and its own
value for any of the keys that qwen3f/infer/text_request.py lists (chat, thinking, temperature, seed, stop, …).
qwen3f/infer/batch_file.py describes OUT.jsonl. The same command again resumes where it stopped.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "generate"
    config.init_from = ""
    config.prompt = ""
    config.prompts = ()  # several prompts instead of one: --config.prompts="('a', 'b')"
    config.images = ""  # files that the prompts ask about, with commas between: a.png,b.jpg
    config.video = ""  # a directory of frames, in the order of their names, or a GIF
    config.video_fps = config_dict.placeholder(float)  # frames a second of config.video; a GIF has its own times
    # Images are scaled to have between min_pixels and max_pixels pixels. All frames of a video together get between
    # about min_pixels / 16 and max_pixels * 3/2.
    config.min_pixels = 65_536
    config.max_pixels = 16_777_216
    config.input = ""  # a .jsonl file of rows to answer. Without prompt, prompts and input: a chat over stdin
    config.out = ""  # a .jsonl file for the answers, in place of stdout
    config.on_bad_row = "error"  # a bad row of config.input: error (names file and line), or skip (counts them)
    config.chat = True  # the prompt is a user's turn in Qwen3's chat format; False: plain text to continue
    config.system = ""  # system message of the chat
    config.tools = ""  # a .json file: a list of descriptions of functions that the model may call; calls are printed
    # Whether the model thinks first in a chat. True: yes, unless the prompt's last switch is /no_think. False: never,
    # even if the prompt says /think. Unset: the template's default. Some models always think, some never do; for them
    # only that value is possible.
    config.thinking = config_dict.placeholder(bool)
    config.chat_template = ""  # hybrid, instruct-2507, thinking-2507 or coder; "": recognise it by the template in DIR
    config.thinking_budget = config_dict.placeholder(int)  # end thinking after this many tokens, by Qwen3's sentence
    config.max_new_tokens = 512
    # Unset: what Qwen3 recommends for a chat with or without thinking (qwen3f.infer.sampling); greedy with chat=False.
    # Setting one of these keeps the defaults of the others.
    config.temperature = config_dict.placeholder(float)  # 0: greedy
    config.top_k = config_dict.placeholder(int)  # 0: all tokens
    config.top_p = config_dict.placeholder(float)
    config.min_p = config_dict.placeholder(float)
    config.presence_penalty = config_dict.placeholder(float)
    config.seed = 0
    config.stop = ()  # an answer ends before any of these texts: --config.stop="('###',)"
    config.batch_size = 256  # answers generated at a time, at most
    # Tokens that the KV cache holds, for all answers together; 0: most of a GPU's memory, 2 GiB on a CPU.
    config.max_tokens = 0
    config.dtype = "auto"  # auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64
    config.device = "auto"  # auto, cpu or cuda
    config.mesh = ""  # tp2 splits the model over two devices; "": one device
    config.collective_timeout = 600.0  # seconds that ranks on CUDA wait for another one in a collective
    return config
