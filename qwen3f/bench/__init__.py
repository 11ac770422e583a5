"""Speed of whole stages on one GPU, compared with their peers in the same run: python -m qwen3f.bench.NAME."""
