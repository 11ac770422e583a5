"""Generated images of shapes, charts and text with captions, questions and answers; pillow only, no files."""

from qwen3f.data.sources.images.picture import KINDS, Picture, check_sides, picture
from qwen3f.data.sources.images.source import NUM_PICTURES, REPEATED, every_picture, pictures

__all__ = ["KINDS", "NUM_PICTURES", "REPEATED", "Picture", "check_sides", "every_picture", "picture", "pictures"]
