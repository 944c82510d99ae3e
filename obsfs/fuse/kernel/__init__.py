"""The native engine: the kernel's FUSE protocol, spoken to /dev/fuse in Python."""
