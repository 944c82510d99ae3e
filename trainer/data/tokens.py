"""Turn records into tokens and labels for supervised training. This decides, for every format, what is learned.

TRL takes a data set with ``input_ids`` and ``labels`` as it is: it only truncates it to ``max_length`` and packs it. So
the check before a run and the run itself use the same function.
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from obsfs.plugin import UsageError, first_line
from trainer.data import messages as chats
from trainer.data.formats import Record

IGNORED = -100
"""The label of a token that is not learned: ``ignore_index`` of torch's cross_entropy."""
_UNFOUND = "unfound"


class Target(NamedTuple):
    """The model that records are for: its tokenizer, its name, and the size of its vocabulary (0 if unknown)."""

    tokenizer: Any
    name: str
    vocabulary: int


class Tokens(NamedTuple):
    """A record as the model sees it.

    Args:
        input_ids: The tokens.
        labels: For each token itself, or :data:`IGNORED` if it is not learned.
        unfound: How many answers are not learned because they cannot be located in the chat template's text.
    """

    input_ids: list[int]
    labels: list[int]
    unfound: int = 0


def what_is_learned(record: Record, options: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether whole records are learned, and in words what is learned.

    Args:
        record: One of the records.
        options: The user's options, of which assistant_only_loss and completion_only_loss count.

    Raises:
        UsageError: The options do not fit the records.
    """
    if "text" in record:
        for name in ("assistant_only_loss", "completion_only_loss"):
            if options.get(name):
                raise UsageError(f"{name} does not fit: the data is text without answers", f"leave {name} out")
        return True, "all of the text"
    if "messages" in record and options.get("completion_only_loss"):
        raise UsageError(
            "completion_only_loss does not fit: the data is conversations", "leave it out: only answers are learned"
        )
    names = ("assistant_only_loss",) if "messages" in record else ("completion_only_loss", "assistant_only_loss")
    given = [name for name in names if options.get(name) is not None]
    whole = [name for name in given if not options[name]]
    if whole and len(whole) == len(given):
        return True, f"questions and answers ({whole[0]}: false)"
    return False, "the answers only"


class Tokenised(NamedTuple):
    """The records of a data set as tokens and labels.

    Args:
        records: The data set.
        cut: How many records are longer than ``max_length``; 0 for streamed data, which is not read yet.
        unfound: How many answers are not learned, see :class:`Tokens`; 0 for streamed data.
    """

    records: Any
    cut: int = 0
    unfound: int = 0


def tokenise(records: Any, tokeniser: Tokeniser, max_length: int | None) -> Tokenised:
    """Return the records of a data set as tokens and labels."""
    from datasets import Dataset, Features, List, Value

    first = next(iter(records))
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64")), _UNFOUND: Value("int64")})
    made = records.map(tokeniser, with_indices=True, remove_columns=list(first), features=features)
    if not isinstance(made, Dataset):
        return Tokenised(made.remove_columns(_UNFOUND))
    cut = unfound = 0
    for batch in made.select_columns(["input_ids", _UNFOUND]).with_format("arrow").iter(batch_size=1000):
        unfound += sum(batch[_UNFOUND].to_pylist())
        if max_length is not None:
            cut += sum(len(ids) > max_length for ids in batch["input_ids"].combine_chunks())
    return Tokenised(made.remove_columns(_UNFOUND), cut, unfound)


def tokenizer_for(tokenizer: Any, arguments: Any) -> Any:
    """Return a copy of the tokenizer, changed as TRL will: by eos_token, pad_token and chat_template_path."""
    from transformers import AutoTokenizer

    tokenizer = copy.deepcopy(tokenizer)
    template = getattr(arguments, "chat_template_path", None)
    if template and Path(template).is_file() and str(template).endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif template:
        try:
            source = AutoTokenizer.from_pretrained(template)
            tokenizer.chat_template = source.get_chat_template()
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UsageError(f"chat_template_path {template} cannot be read ({reason})", "give a FILE.jinja") from None
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([one for one in source.added_tokens_decoder.values() if one.content not in known])
        tokenizer.eos_token = source.eos_token
    for name in ("eos_token", "pad_token"):
        if token := getattr(arguments, name, None):
            if token not in tokenizer.get_vocab():
                raise UsageError(f"{name}: {token!r} is not in the vocabulary of the model", "name one that is")
            setattr(tokenizer, name, token)
    return tokenizer


def render(tokenizer: Any, messages: list[chats.Message], tools: str | None, **options: Any) -> str:
    """Return the text that the chat template makes. Raises ValueError with the template's reason."""
    from jinja2 import TemplateError

    offered = json.loads(tools) if tools else None
    try:
        made = tokenizer.apply_chat_template(chats.for_template(messages), tools=offered, tokenize=False, **options)
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        raise ValueError(first_line(error)) from None
    return str(made)


class Tokeniser:
    """Makes tokens of records for task sft, for ``Dataset.map``.

    Args:
        target: The model that the records are for.
        is_whole: Learn whole records; otherwise learn only the answers (plain text is always learned whole).
        where: Returns a name for the record at an index, for errors.
    """

    def __init__(self, target: Target, *, is_whole: bool, where: Callable[[int], str]) -> None:
        self._target, self._is_whole, self._where = target, is_whole, where
        self._tokenizer = target.tokenizer
        self._marked = _marked_template(target.tokenizer)

    def __call__(self, record: Record, index: int) -> dict[str, list[int] | int]:
        """Raises UsageError, which names the record."""
        made = self.tokens(record, index)
        return {"input_ids": made.input_ids, "labels": made.labels, _UNFOUND: made.unfound}

    def tokens(self, record: Record, index: int) -> Tokens:
        """Return a record's tokens and labels. Raises UsageError, which names the record."""
        try:
            made = self._tokens(record)
        except ValueError as error:
            raise refused_by_template(self._target, self._where(index), record, str(error)) from None
        check_vocabulary(made.input_ids, self._target, lambda: self._where(index))
        return made

    def _tokens(self, record: Record) -> Tokens:
        if "text" in record:
            ids = self._tokenizer(self._ended(record["text"]))["input_ids"]
            return Tokens(ids, list(ids))
        if "messages" in record:
            return self._of_chat(record["messages"], chats.learned(record["messages"]), record.get("tools"))
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list):
            wanted = [len(prompt) + i for i in chats.learned(completion)]
            return self._of_chat([*prompt, *completion], wanted, record.get("tools"))
        ids = self._tokenizer(prompt + self._ended(completion))["input_ids"]
        if self._is_whole:
            return Tokens(ids, list(ids))
        start = common_length(self._tokenizer(prompt)["input_ids"], ids)
        return Tokens(ids, [IGNORED] * start + ids[start:])

    def _ended(self, text: str) -> str:
        eos = self._tokenizer.eos_token or ""
        return text if text.endswith(eos) else text + eos

    def _of_chat(self, messages: list[chats.Message], wanted: list[int], tools: str | None) -> Tokens:
        if self._is_whole and any(chats.LOSS in one for one in messages):
            raise ValueError("some of its messages have loss: false, and assistant_only_loss: false learns all")
        if not self._is_whole and (made := self._of_marks(messages, wanted, tools)):
            return made
        text = render(self._tokenizer, messages, tools)
        if self._is_whole:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return Tokens(ids, list(ids))
        return self._of_spans(messages, wanted, tools, text)

    def _of_marks(self, messages: list[chats.Message], wanted: list[int], tools: str | None) -> Tokens | None:
        """Locate the answers by the template's generation marks. Returns None if the marks do not separate them."""
        from jinja2 import TemplateError

        if self._marked is None:
            return None
        try:
            made = self._tokenizer.apply_chat_template(
                chats.for_template(messages),
                tools=json.loads(tools) if tools else None,
                chat_template=self._marked,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise ValueError(first_line(error)) from None
        ids, mask = made["input_ids"], made["assistant_masks"]
        runs = list(_runs(mask))
        answers = [i for i, one in enumerate(messages) if one["role"] == "assistant"]
        if len(runs) != len(answers):
            return None
        chosen = [run for run, i in zip(runs, answers, strict=True) if i in wanted]
        return Tokens(ids, _labels(ids, chosen))

    def _of_spans(self, messages: list[chats.Message], wanted: list[int], tools: str | None, text: str) -> Tokens:
        """Locate the answers by rendering the conversation up to each answer, without and with it."""
        spans = [span for i in wanted if (span := self._span(messages, i, tools, text))]
        unfound = len(wanted) - len(spans)
        if wanted and not spans:
            # The template writes earlier answers differently: end with the last one, which it writes unchanged.
            messages = messages[: wanted[-1] + 1]
            text = render(self._tokenizer, messages, tools)
            span = self._span(messages, wanted[-1], tools, text)
            if span is None:
                raise ValueError("its answers cannot be found in what the template makes of it")
            spans, unfound = [span], unfound - 1
        ids, found = self._tokens_of(text, spans)
        return Tokens(ids, _labels(ids, found), unfound)

    def _span(self, messages: list[chats.Message], i: int, tools: str | None, text: str) -> tuple[int, int] | None:
        """Return the span of answer `i` in the text. None if the text has it in another form than at its end."""
        try:
            upto = render(self._tokenizer, messages[: i + 1], tools) if i + 1 < len(messages) else text
            plain = render(self._tokenizer, messages[:i] or messages[:1], tools)
            before = render(self._tokenizer, messages[:i] or messages[:1], tools, add_generation_prompt=True)
            if not i:  # nothing precedes the answer but the prompt that starts it
                before, plain = before.removeprefix(plain), ""
        except ValueError:
            return None
        start = common_length(before, text)
        upto = upto if text.startswith(upto) else upto.rstrip()
        if not text.startswith(upto) or start < len(plain.rstrip()) or start >= len(upto):
            return None
        return start, len(upto)

    def _tokens_of(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text, and the spans of tokens for spans of characters.

        A token across the start of a span belongs to the span: there the text stops being the question.
        """
        if getattr(self._tokenizer, "is_fast", False):
            made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            starts, ends = zip(*made["offset_mapping"], strict=True)
            # Tokens without characters of their own repeat an offset, so the ends never decrease.
            return made["input_ids"], [(bisect_right(ends, first), bisect_left(starts, last)) for first, last in spans]
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        edges = [edge for span in spans for edge in span]
        parts = [self._tokenizer(text[:edge], add_special_tokens=False)["input_ids"] for edge in edges]
        places = [common_length(part, ids) for part in parts]
        return ids, list(zip(places[::2], places[1::2], strict=True))


def refused_by_template(target: Target, where: str, record: Record, reason: str) -> UsageError:
    """Return the error for a record that the chat template does not take."""
    sides = [side for side in record.values() if isinstance(side, list)]
    roles = {one.get("role") for side in sides for one in side if isinstance(one, dict)}
    remedy = "change the record, or give another template with chat_template_path: FILE.jinja"
    if "system" in roles and "system" in reason.casefold():
        remedy = "take the system prompts out, or give another template with chat_template_path: FILE.jinja"
    elif "alternat" in reason.casefold():
        remedy = "let user and assistant take turns, or give another template with chat_template_path: FILE.jinja"
    return UsageError(f"the chat template of {target.name} does not take {where} ({reason})", remedy)


def check_vocabulary(ids: list[int], target: Target, where: Callable[[], str]) -> None:
    """Raise UsageError for a token that the model has no row for."""
    if target.vocabulary and ids and (largest := max(ids)) >= target.vocabulary:
        token = target.tokenizer.convert_ids_to_tokens(largest)
        raise UsageError(
            f"{where()} has the token {token!r} ({largest}), and {target.name} knows {target.vocabulary} tokens",
            "resize the model (resize_token_embeddings(len(tokenizer))), save it, and train that one",
        )


def common_length(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """Return how many tokens (or characters) two lists (or texts) begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))


def _marked_template(tokenizer: Any) -> str | None:
    """Return a template that marks the answers and their end token: the model's own, or TRL's for its family."""
    from trl.chat_template_utils import (
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_stop_token_trained,
    )

    if not tokenizer.chat_template or not getattr(tokenizer, "is_fast", False):
        return None
    try:
        own = has_generation_markers(tokenizer.chat_template)
        template = tokenizer.get_chat_template() if own else get_training_chat_template(tokenizer)
        if template and is_chat_template_stop_token_trained(tokenizer, template):
            return str(template)
    except Exception:  # a template is a program, and may raise anything
        return None
    return None


def _runs(mask: list[int]) -> Iterator[tuple[int, int]]:
    start = None
    for n, bit in enumerate([*mask, 0]):
        if bit and start is None:
            start = n
        elif not bit and start is not None:
            yield start, n
            start = None


def _labels(ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels
