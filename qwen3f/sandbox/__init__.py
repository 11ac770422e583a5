"""Runs a model's code in a sandbox, so that it can harm nobody and passes its tests only if it is right."""

from qwen3f.sandbox.confined import Limits
from qwen3f.sandbox.run import Case, Verdict, run_all, run_tests

__all__ = ["Case", "Limits", "Verdict", "run_all", "run_tests"]
