"""Code of a model, run so that it can harm nobody and win nothing but by being right."""

from qwen3f.sandbox.confined import Limits
from qwen3f.sandbox.run import Case, Verdict, run_all, run_tests

__all__ = ["Case", "Limits", "Verdict", "run_all", "run_tests"]
