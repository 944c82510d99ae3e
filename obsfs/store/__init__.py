"""The bucket: what obsfs asks of an object store, and how."""
