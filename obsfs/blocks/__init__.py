"""The engine: bytes of one object version, from the SSD or from the bucket."""
