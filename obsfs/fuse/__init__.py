"""The kernel's side of a mount: the native FUSE backend (`kernel`), and libfuse."""
