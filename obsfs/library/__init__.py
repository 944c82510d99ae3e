"""A library of models in a bucket: published whole with a manifest, fetched verified, known by name and version."""
