"""The native FUSE backend: the kernel's FUSE protocol, spoken to /dev/fuse in Python."""
