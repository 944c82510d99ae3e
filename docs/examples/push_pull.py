"""Publish a directory as a model, and fetch it again, verified.

python push_pull.py ./Qwen2-7B-tuned obs://models/Qwen2-7B-tuned@v1 ./copy
"""

from __future__ import annotations

import sys

import obsfs


def main(directory: str, url: str, copy: str) -> None:
    """Check, push and pull; print the name that was published and where the copy is."""
    obsfs.check_model(directory)  # raises when a file is missing, cut off or damaged
    print(obsfs.push(directory, url))
    name, _, version = url.partition("@")
    print(obsfs.snapshot_download(name, revision=version or None, local_dir=copy))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except obsfs.ObsfsError as error:
        sys.exit(f"push_pull: {error}")
