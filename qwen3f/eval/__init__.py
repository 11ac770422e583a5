"""Evaluation: log-likelihoods, multiple choice and perplexity of a model, benchmarks, and what judges answers."""

from qwen3f.eval.evaluator import Evaluator

__all__ = ["Evaluator"]
