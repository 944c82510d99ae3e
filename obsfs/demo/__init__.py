"""What the demo, the tests and the benchmarks share: an embedded S3 server, and a small real model."""
