"""The directory: what a bucket looks like as a tree, what each file system call means, and who serves it."""
