"""Whole stages on one GPU, each beside its peer in the same run: python -m qwen3f.bench.NAME."""
