"""Data for a run: found (places.py), read (reading.py, loading.py), told apart and converted (formats.py, messages.py),
with an account of what is not used (account.py), made into tokens (tokens.py), and looked at before the weights are
loaded (check.py)."""

from trainer.data.check import Limits, Report, look, measure
from trainer.data.formats import is_conversation, recognise, shown
from trainer.data.loading import Loaded, load, load_all
from trainer.data.sources import BUILTIN, check_name, find
from trainer.data.tokens import Target, Tokeniser, tokenise, tokenizer_for, what_is_learned

__all__ = [
    "BUILTIN",
    "Limits",
    "Loaded",
    "Report",
    "Target",
    "Tokeniser",
    "check_name",
    "find",
    "is_conversation",
    "load",
    "load_all",
    "look",
    "measure",
    "recognise",
    "shown",
    "tokenise",
    "tokenizer_for",
    "what_is_learned",
]
