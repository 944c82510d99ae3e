"""Keep the chatter of libraries from users: what they draw, will rename one day, or would do faster elsewhere.

What fails is raised, and told by whoever catches it. Nothing large is imported: most chatter is that of an import.
"""

from __future__ import annotations

import logging
import warnings

from obsfs.plugin import VisibleFormatter

_TALKATIVE = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "kernels", "peft", "trl")
"""bitsandbytes warns at its import, on processors with AVX512-BF16, that it found no kernel of the hub for them."""


def silence_libraries() -> None:
    """Have libraries log errors only, and not warn of what will change one day. Call it before their imports."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=kind)


def silence_progress_bars() -> None:
    """Have datasets and transformers draw no bars, in addition, and print text by `visible`. Imports them."""
    import datasets
    import transformers

    silence_libraries()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs of an error, it raises too
    transformers.utils.logging.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.setFormatter(VisibleFormatter("[transformers] %(message)s"))
