"""Vision-language training: chats with pictures and videos, mixed with text.

    python launch.py --config experiments/multimodal.py:nano_vl --workdir W
    python launch.py --config experiments/multimodal.py:qwen3-vl-2b --config.init_from=DIR \
        --config.data.mixture=chats@DIR2=0.8,ultrachat@DIR3=0.2 --workdir W

chats@DIR reads rows of messages whose parts are text, images, and videos: GIF, APNG and WebP files, directories
and lists of frames (qwen3f/data/multimodal/README.md).

The preset after the colon names the model (default qwen3-vl-2b). If init_from has no vision tower, a fresh one is added
to its language model. --config.optimizer.rates freezes parts, or gives them other learning rates, by patterns of their
names. To train only the mergers, as Qwen3-VL's first stage does, write
--config.optimizer.rates='model\\.visual\\.(merger|deepstack_merger_list)\\..*=1,.*=0'.
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import multimodal_config

SMALL = ("nano_vl", "debug_vl")


def get_config(preset: str = "qwen3-vl-2b") -> ConfigDict:
    preset = preset or "qwen3-vl-2b"
    config = multimodal_config(preset)
    config.schedule.kind = "cosine"
    config.schedule.peak_lr = 1e-5
    config.schedule.warmup = 0.03
    config.optimizer.weight_decay = 0.0
    config.seq_len = 8192
    config.steps, config.batch_size = 2000, 32
    if preset in SMALL:  # from scratch, on generated pictures at their own size: questions and descriptions
        config.data.mixture = "images=0.5,captions=0.5"
        config.data.min_pixels, config.data.max_pixels = 64 * 64, 128 * 128
        config.seq_len, config.data.patches, config.data.images = 512, 1024, 8
        config.schedule.peak_lr = 1e-3
        config.steps, config.batch_size = 3000, 8
    if preset == "nano_vl":  # shapes and bars that two CPU cores learn in minutes, in few tokens
        config.data.picture_kinds, config.data.pictures = "shapes,bar", 28_672
        config.data.min_side = config.data.max_side = 96
        config.data.patches, config.data.images = 18 * 36, 18
        config.data.mixture = "images=0.6,captions=0.4"
        # vocab_size=576: one token per word
        config.model.update(vocab_size=576, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
        config.model.update(mrope_section=(6, 5, 5), vision_patch_size=16, vision_image_size=96)
        config.optimizer.kind, config.optimizer.update_rms = "muon", 0.2 / 3
        config.schedule.kind, config.schedule.decay, config.schedule.min_ratio = "wsd", 0.7, 0.0
        config.schedule.peak_lr = 1e-2
        config.steps, config.batch_size = 760, 8
        config.eval.every, config.checkpoint.every = 0, 380  # evaluate only at the end
    if preset == "seed_vl":
        config.data.max_pixels = 672**2
    return config
