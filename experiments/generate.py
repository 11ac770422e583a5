"""Answers questions with a trained model: one, several, those of a file, or a chat's.

    python launch.py --config experiments/generate.py --config.init_from=DIR --config.prompt="…" --config.thinking=True
    python launch.py --config experiments/generate.py --config.init_from=DIR
    python launch.py --config experiments/generate.py --config.init_from=DIR --config.input=IN.jsonl \
        --config.out=OUT.jsonl

DIR is a Hugging Face directory (Qwen3 or Qwen3-VL, dense or MoE), a workdir or its checkpoints/N. Answers come out on
stdout as they are written. Nothing is written, there or in a workdir, unless --config.out names a file. A model that
has only been pretrained continues text: --config.chat=False. A model with a vision tower is asked about
--config.images=a.png,b.jpg and --config.video=DIR, by --config.prompt or --config.prompts. --config.mesh=tp2 cuts a
model over two devices.

What is not set is as Qwen3 recommends: with a thought temperature 0.6, top_p 0.95 and top_k 20; without one 0.7, 0.8,
20 and a presence penalty of 1.5, which a temperature of 0 keeps: greedy is --config.presence_penalty=0 too.

The second is a chat: a question a line, from the terminal or a pipe. /think and /no_think as Qwen3 has them, /reset,
/quit or the end of the input; Ctrl-C stops an answer and keeps what was said.

The third answers a file's rows, {"prompt": "…"} or {"messages": […]}, each with an "id" and any key below that
qwen3f/infer/text_request.py names for itself, if it likes (chat, thinking, temperature, seed, stop, …);
qwen3f/infer/batch_file.py says what OUT.jsonl gets. The same command goes on where it was stopped.
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
    config.video_fps = config_dict.placeholder(float)  # how fast its frames were taken; a GIF says so itself
    config.min_pixels = 65_536  # images are scaled to lie between
    config.max_pixels = 16_777_216  # and a video's frames together between 1/16 of the one and 3/2 of the other
    config.input = ""  # a .jsonl file of rows instead. Without any of the three: a chat over stdin
    config.out = ""  # a .jsonl file for the answers, in place of stdout
    config.on_bad_row = "error"  # of config.input: error, which names file and line; or skip, which counts them
    config.chat = True  # the prompt is a user's turn in Qwen3's chat format; False: text to go on with
    config.system = ""  # system message of the chat
    # chat: whether the model thinks first. True: unless a prompt's last switch is /no_think; False: never, whatever a
    # prompt's /think says. Unset: as its template does by itself; a model that never thinks, or always, can do nothing
    # else.
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
    config.stop = ()  # texts before which an answer ends: --config.stop="('###',)"
    config.batch_size = 256  # answers at a time, at most
    config.max_tokens = (
        0  # room of the key/value cache, of all answers together; 0: most of a GPU's memory, 2 GiB on a CPU
    )
    config.dtype = "auto"  # auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64
    config.device = "auto"  # auto, cpu or cuda
    config.mesh = ""  # tp2 cuts the model over two devices; empty: one
    config.collective_timeout = 600.0  # seconds that ranks on CUDA wait for another one in a collective
    return config
