"""The tests. ``python3 -m tests`` sets up all that they need and runs every gate."""
