"""What obsfs promises, measured: ratios of figures from one run, on one machine. See ``python -m benchmarks --help``."""
