"""The processes behind a mount: server, supervisor, and what asks them from outside."""
