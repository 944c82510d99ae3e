"""Pure hints: what is in a file, and which bytes its reader wants next."""
