"""Benchmarks; results are appended to bench/results/."""
