"""Keep the libraries' warnings, hints and progress bars away from users.

Failures are not hidden: they are raised, and whoever catches them reports them. This module imports no large package,
because most of the noise comes from imports.
"""

from __future__ import annotations

import logging
import warnings

from obsfs.plugin import VisibleFormatter

_TALKATIVE = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "kernels", "peft", "trl")
"""For example, bitsandbytes warns when imported on a processor with AVX512-BF16 that it found no kernel on the hub."""


def silence_libraries() -> None:
    """Let libraries log errors only, and drop deprecation warnings. Call it before importing them."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=kind)


def silence_progress_bars() -> None:
    """Also switch off the progress bars of datasets and transformers, and escape what they log. Imports both."""
    import datasets
    import transformers

    silence_libraries()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it also raises each error that it logs
    transformers.utils.logging.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.setFormatter(VisibleFormatter("[transformers] %(message)s"))
