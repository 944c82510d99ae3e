"""The data of a run, in the order of its steps.

* sources.py finds files, buckets and data sets of the hub.
* reading.py and strict_json.py read files record by record; loading.py makes data sets of them.
* formats.py and messages.py recognise a record's format and convert it; unused_fields.py keeps what is left over.
* tokens.py makes tokens and labels; check.py checks a sample before the weights are loaded.
"""

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
