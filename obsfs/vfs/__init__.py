"""The file system without a kernel: names, nodes, listings and what each operation means."""
