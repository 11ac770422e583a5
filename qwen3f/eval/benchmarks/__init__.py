"""The benchmarks, a file each; `registry` lists them, `benchmark` says what one is."""
