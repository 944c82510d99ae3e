"""The data of a run: read, checked, and turned into what TRL's trainer takes, with notes for people on the way."""

from __future__ import annotations

from typing import Any

from obsfs.plugin import UsageError, tell
from trainer.config import TrainConfig
from trainer.data import (
    Limits,
    Loaded,
    Report,
    Target,
    Tokeniser,
    is_conversation,
    load_all,
    look,
    measure,
    tokenise,
    what_is_learned,
)


class RunData:
    """The steps of a run that deal with its data.

    `notes` are lines for people, and `figures` counts for JSON: both grow with each step.
    """

    def __init__(self, config: TrainConfig, arguments: Any, model_name: str, *, is_main: bool) -> None:
        """Take what the steps need.

        Args:
            config: The run.
            arguments: TRL's arguments of the run; :meth:`prepare` sets what the labels already say.
            model_name: The name of the model, for errors.
            is_main: Whether this process of the run prints the notes.
        """
        self._config, self._arguments, self._model_name, self._is_main = config, arguments, model_name, is_main
        self.figures: dict[str, float] = {}
        self.notes: list[str] = []
        self._reports: list[Report] = []

    def read(self, target: Target) -> list[Loaded]:
        """Read the records to train on and, if the run has any, those to evaluate with. Raises UsageError."""
        config, has_template = self._config, bool(target.tokenizer.chat_template)
        found = [
            load_all(
                places,
                config.task,
                split=config.split,
                streaming=config.streaming,
                chat=has_template,
                settings=config.settings,
                ignored=config.ignore_columns,
            )
            for places in (config.data, config.eval_data)
            if places
        ]
        if not has_template and any(is_conversation(next(iter(one.records))) for one in found):
            raise UsageError(
                f"the data is conversations, and the tokenizer of {self._model_name} has no chat template",
                "give one with chat_template_path: FILE.jinja, or train on plain prompts and completions",
            )
        return found

    def check(self, found: list[Loaded], target: Target) -> Report:
        """Check a sample of the records before the weights are loaded, and print what a user should know.

        Returns:
            The report on the training data.

        Raises:
            UsageError: A record cannot be trained on.
        """
        limits = Limits.of(self._config.task, self._arguments)
        reports = []
        for one in found:
            tokeniser, loss = self._tokeniser(one, target)
            reports.append(look(one, tokeniser, target, limits, loss))
        self.figures |= reports[0].figures()
        self._reports = reports
        self._tell([reports[0].summary(), *(line for one in reports for line in one.warnings())])
        return reports[0]

    def _tell(self, lines: list[str]) -> None:
        """Print notes on the data, and keep them for the result."""
        self.notes += lines
        if self._is_main:
            for line in lines:
                tell(line, err=True)

    def _tokeniser(self, one: Loaded, target: Target) -> tuple[Tokeniser | None, str]:
        """Return what tokenises the records (None where TRL does it), and which part of them is learned, in words."""
        if self._config.task != "sft":
            return None, "the answers only"
        is_whole, loss = what_is_learned(next(iter(one.records)), self._config.options)
        return Tokeniser(target, is_whole=is_whole, where=one.places.where), loss

    def prepare(self, found: list[Loaded], target: Target) -> tuple[Any, Any]:
        """Return the training and evaluation records as TRL's trainer takes them: for task sft, tokens and labels."""
        config, arguments = self._config, self._arguments
        parts = []
        for one, report in zip(found, self._reports, strict=True):
            tokeniser, _ = self._tokeniser(one, target)
            if tokeniser is None:
                made = measure(one, report, target, Limits.of(config.task, arguments))
            else:
                made = tokenise(one.records, tokeniser, report.max_length)
            parts.append(made.records)
            self._tell(report.rest(made))
        if config.task == "sft":
            arguments.assistant_only_loss = False  # the labels say it already; TRL would look for messages
        if len(parts) == 1 and config.test_split_size and not config.streaming:
            both = parts[0].train_test_split(test_size=config.test_split_size, seed=arguments.seed)
            return both["train"], both["test"]
        return parts[0], parts[1] if len(parts) > 1 else None

    def count_dropped(self, given: Any, kept: Any) -> None:
        """Report how many records TRL dropped, which it does silently. Raises UsageError if none is left."""
        arguments = self._arguments
        if self._config.streaming or getattr(arguments, "packing", False):
            return
        dropped = len(given) - len(kept)
        if dropped <= 0:  # KTO makes two records of a pair
            return
        behind = f"their answers lie behind max_length {arguments.max_length}"
        if not len(kept):
            raise UsageError(f"all {dropped:,} records are dropped: {behind}", "raise max_length, or shorten them")
        self.figures["records_dropped"] = dropped
        self._tell([f"{dropped:,} of {len(given):,} records are dropped: {behind}"])
