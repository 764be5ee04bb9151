"""What a page about a checkpoint shows: the settings of `quietstar_jax.report`."""

from __future__ import annotations

from dataclasses import dataclass

from quietstar_jax.data_config import TextDocuments
from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.thinking import NEVER, parse_policy

MOST_TOKENS = 20_000  # on one page: about 10 MB with four thoughts of six tokens


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how the model thinks in it; see `python -m quietstar_jax.report --help`."""

    data: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()  # texts in place of `data`; each is a document
    limit: int = 20  # documents of `data`; 0 = all
    page_tokens: int = 4000
    sequence_length: int = 256
    think: str | None = None  # policy of thinking; None = that of the model
    thought_length: int | None = None  # None = as trained
    tokens_ahead: int | None = None
    reach: int = 0  # 0 = as the first model says
    samples: int = 3
    seed: int = 0
    text_key: str = "text"
    text_documents: TextDocuments = "file"
    data_dir: str = ""

    def check(self) -> None:
        """Raises ConfigError for impossible values."""
        if bool(self.data) == bool(self.prompt):
            raise ConfigError(
                "The page needs one text: give either `data`, for example my_text.jsonl, or `prompt`, the text itself."
            )
        if self.think is not None and parse_policy(self.think) == NEVER:
            raise ConfigError("think is 'never', so there is nothing to show. Give another policy.")
        at_least = dict(
            limit=0, page_tokens=2, sequence_length=3, thought_length=1, tokens_ahead=1, reach=0, samples=0, seed=0
        )  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"`{name}` is {value}; it must be {least} or more.")
        if self.page_tokens > MOST_TOKENS:
            raise ConfigError(
                f"`page_tokens` is {self.page_tokens}; it must be at most {MOST_TOKENS}: browsers are slow with larger "
                "pages."
            )
        if self.samples > 16:
            raise ConfigError(f"`samples` is {self.samples}; it must be at most 16.")
