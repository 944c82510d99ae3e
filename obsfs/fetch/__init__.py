"""From the bucket to the cache: what is fetched, when, and over which connections."""
