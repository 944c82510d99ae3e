"""``obsfs bench``: how fast a bucket is through obsfs, measured by its user."""
