"""Generated images of shapes, charts and text with captions, questions and answers; pillow only, no files."""

from qwen3f.data.sources.images.picture import KINDS, Picture, picture
from qwen3f.data.sources.images.source import NUM_PICTURES, pictures

__all__ = ["KINDS", "NUM_PICTURES", "Picture", "picture", "pictures"]
