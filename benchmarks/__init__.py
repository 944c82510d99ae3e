"""What obsfs promises, measured: ratios of figures from one run on one machine (``python -m benchmarks --help``)."""
