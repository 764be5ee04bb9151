"""Converts text to token ids and back, with any Hugging Face fast tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quietstar_jax.data.begin_of_text import as_published, inserted, set_template, without_begin
from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.hf.files import check_regular

SYNTHETIC = "synthetic"
BROKEN = "\N{REPLACEMENT CHARACTER}"  # decoded from the bytes of an incomplete character
_FILE = "tokenizer.json"
# Text for which tokenizers with the same vocabulary may differ: spaces, numbers, scripts, case, accents, code.
_PROBE = (
    "The quick brown fox's 12,345.678 + 9e-7 = x²; isn't it?  Two  spaces,\ttab\n\n  def f(a_b): return {'k': [1]}\r\n"
    "Größe, naïve café, e\u0301; Ελληνικά Русский العربية हिन्दी 中文字符 日本語 한국어 🙂 \u200b\ufeff unBELIEVABLE"
)
_HUB_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "config.json")


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer without truncation and padding.

    `encode` adds no tokens; `encode_text` adds the tokens that begin a text, which only `begins` determines.

    It can be pickled and sent to worker processes.
    """

    name: str  # as given to `load_tokenizer`
    fast: PreTrainedTokenizerFast
    rows: int = 0  # rows of the model's embedding, if the tokenizer has more tokens than that; otherwise 0

    def __post_init__(self) -> None:
        # tokenizer.json may contain truncation and padding settings, which would silently cut documents.
        self.fast.backend_tokenizer.no_truncation()
        self.fast.backend_tokenizer.no_padding()
        eos = self.fast.eos_token
        if eos is None or self.token_id(eos) is None:
            problem = (
                "has no end-of-text token"
                if eos is None
                else f"names {eos!r} as its end of text, but does not contain it"
            )
            raise DataError(
                f"The tokenizer {self.name!r} {problem}. Documents are ended and padded with it: set `eos_token` in "
                "its tokenizer_config.json to a token of the vocabulary."
            )

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`. Special tokens that are spelled out in the text become their ids."""
        # Of all methods that return these ids, this one is the fastest, and the only one that lets other threads run:
        # a prefetching thread must not delay the training step.
        ids: list[int] = self.fast.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        self.check(ids, text)
        return ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of several texts, using as many threads as there are cores."""
        encodings = self.fast.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for one, text in zip(encodings, texts, strict=True) if self.rows else ():
            self.check(one.ids, text)
        return [one.ids for one in encodings]

    def render_conversation(self, messages: list[dict[str, Any]]) -> str:
        """Returns a conversation as text according to the tokenizer's chat template, with special tokens spelled out.

        Raises:
          DataError: the tokenizer has no template.
        """
        if not self.fast.chat_template:
            raise DataError(
                f"The tokenizer {self.name!r} has no chat template, so it cannot render a conversation. Use the "
                "tokenizer of a chat model, add a chat_template.jinja to its folder, or name a field with plain text."
            )
        return cast(str, self.fast.apply_chat_template(messages, tokenize=False))

    def within(self, rows: int, known: Collection[int] = ()) -> Tokenizer:
        """Returns this tokenizer for a model with `rows` embeddings; a text with a token beyond them raises an error.

        Args:
          known: ids beyond `rows` that need no warning: start and end of thoughts.

        Raises:
          DataError: the end-of-text token has no row.
        """
        if self.vocab_size <= rows:
            return self
        if self.eos_id >= rows:
            raise DataError(
                f"The tokenizer {self.name!r} ends a text with {self.fast.eos_token!r} (id {self.eos_id}), but the "
                f"model has only {rows} embeddings. Use the tokenizer that came with the model (leave data.tokenizer "
                "empty)."
            )
        beyond = sorted((i, token) for token, i in self.fast.get_vocab().items() if i >= rows and i not in known)
        if beyond:
            logging.warning(
                "The tokenizer %r has %d tokens (%s%s) for which the model has no embedding: a text that contains one "
                "is an error.", self.name, len(beyond), beyond[0][1], ", ..." if len(beyond) > 1 else "",
            )  # fmt: skip
        return dataclasses.replace(self, rows=rows)

    def check(self, ids: Sequence[int] | np.ndarray, text: str = "") -> None:
        """Checks that the model has an embedding for every id.

        Raises:
          DataError: an id has no embedding; the message names the token and its surroundings in the text.
        """
        if not self.rows or len(ids) == 0 or (largest := int(np.max(ids))) < self.rows:
            return
        token = str(self.fast.convert_ids_to_tokens(largest))
        at = text.find(token)
        near = f" (near {text[max(at - 20, 0) : at + len(token) + 20]!r})" if at >= 0 else ""
        raise DataError(
            f"The text contains the token {token!r}{near}, id {largest}, for which the model has no embedding: it has "
            f"{self.rows}. Remove the token from the text, or resize the model's embeddings to the tokenizer."
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, with special tokens spelled out and without clean-up of spaces.

        A byte that is not part of a character becomes U+FFFD. Neighbouring characters are preserved: the library alone
        would also replace all neighbouring characters that are spelled in byte tokens.
        """
        ids = [int(i) for i in ids]
        text: str = self.fast.backend_tokenizer.decode(ids, skip_special_tokens=False)
        if BROKEN not in text or not self._bytes:
            return text
        broken = self._broken_bytes(ids)
        if not broken:
            return text
        bounds = [-1, *broken, len(ids)]
        parts = [ids[start + 1 : stop] for start, stop in itertools.pairwise(bounds)]
        decoded = [self.decode(parts[0]), *map(self.decode_within, parts[1:])]
        return BROKEN.join(decoded)

    def decode_within(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids as it is after other tokens of a text.

        Decoders treat the first token of a text differently: they strip its space, or add one before all others.
        """
        anchor, before = self._anchor
        return self.decode([*anchor, *ids]).removeprefix(before)

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token that can begin a text, and its text."""
        anchor = self.encode("a")[:1] or [self.eos_id]
        return anchor, self.decode(anchor)

    @property
    def splits_words(self) -> bool:
        """Whether tokens are words: the spaces between them are then not part of any token."""
        return self.fast.backend_tokenizer.decoder is None

    @functools.cached_property
    def _bytes(self) -> dict[int, int]:
        """Id -> byte of the tokens that spell unknown characters; empty if the decoder does not use such tokens."""
        decoder = self.fast.backend_tokenizer.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return {}
        pairs = ((self.token_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
        return {token: byte for token, byte in pairs if token is not None}

    def _broken_bytes(self, ids: Sequence[int]) -> list[int]:
        """Returns the indices of byte tokens that are not part of a character."""
        broken: list[int] = []
        for is_byte, run in itertools.groupby(range(len(ids)), lambda place: ids[place] in self._bytes):
            places = list(run)
            if is_byte:
                spelled = bytes(self._bytes[ids[place]] for place in places)
                at = 0
                while at < len(spelled):
                    size = next((n for n in range(1, 5) if _is_character(spelled[at : at + n])), 0)
                    broken += [] if size else [places[at]]
                    at += size or 1
        return broken

    def token_id(self, token: str) -> int | None:
        """Returns the id of a single token; None if the vocabulary lacks it."""
        token_id: int | None = self.fast.backend_tokenizer.token_to_id(token)
        return token_id

    def shown(self, token: int) -> str:
        """Returns an id and its text, for messages."""
        return f"{token} ({self.decode([token])!r})" if 0 <= token < self.vocab_size else str(token)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1, including added tokens: the minimum number of rows of an embedding."""
        return max(self.fast.get_vocab().values()) + 1

    def fingerprint(self) -> str:
        """Returns a hash of everything that determines ids and text.

        It covers vocabulary, added tokens, splitting, decoding, and begin, end and padding tokens. It is the same after
        `save` and `load_tokenizer`, and does not depend on the name of the folder.
        """
        content = _set_fields(json.loads(self.fast.backend_tokenizer.to_str()))
        content["post_processor"] = None  # adds only begin and end tokens, which are hashed separately below
        decided = [content, self.bos_id, self.eos_id, self._named_pad_id, self.begin_ids]
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def vocabulary_fingerprint(self) -> str:
        """Hash of the vocabulary and of the ids of a diverse sample text: equal if text becomes the same ids.

        Added tokens are not included: they affect only text that spells them out.
        """
        vocabulary = sorted(self.fast.backend_tokenizer.get_vocab(with_added_tokens=False).items())
        return hashlib.sha256(json.dumps([vocabulary, self.encode(_PROBE)]).encode()).hexdigest()

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-text token, or None."""
        return None if self.fast.bos_token is None else self.token_id(self.fast.bos_token)

    @functools.cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer adds before every text; () if it adds none. See docs/tokenizers.md."""
        return inserted(self.fast)

    def begins(self, prepend_bos: str = "auto") -> tuple[int, ...]:
        """Returns the ids that begin a text for a value of `data.prepend_bos`.

        Raises:
          ConfigError: the value is `always`, but the tokenizer has no begin token.
        """
        if prepend_bos == "never":
            return ()
        if prepend_bos != "always":
            return self.begin_ids
        if not self.usual_begin:
            raise ConfigError(
                f"config.data.prepend_bos is 'always', but the tokenizer {self.name!r} has no begin-of-text token. "
                "Set `bos_token` in its tokenizer_config.json, or set prepend_bos to 'auto'."
            )
        return self.usual_begin

    @property
    def usual_begin(self) -> tuple[int, ...]:
        """`begin_ids`, or else the begin-of-text token that the tokenizer names; `begins` returns these ids or ()."""
        return self.begin_ids or (() if self.bos_id is None else (self.bos_id,))

    def encode_text(self, text: str, begin: Sequence[int]) -> list[int]:
        """Returns `begin` and the token ids of a text; `begin` is not repeated if the text already spells it out."""
        return [*begin, *without_begin(self.encode(text), begin)]

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        return cast(int, self.token_id(self.fast.eos_token))  # checked when the tokenizer was wrapped

    @property
    def unk_id(self) -> int | None:
        """Id of the token that replaces unknown text, or None."""
        return self.fast.unk_token_id

    @functools.cached_property
    def unknown_ids(self) -> tuple[int, ...]:
        """Ids that replace unknown text."""
        names = (getattr(self.fast.backend_tokenizer.model, "unk_token", None), self.fast.unk_token)
        return tuple({token for name in names if name for token in (self.token_id(name),) if token is not None})

    @property
    def pad_id(self) -> int:
        """Id that fills short sequences: the padding token, or the end of text as in the paper."""
        return self.eos_id if 0 < self.rows <= self._named_pad_id else self._named_pad_id

    @property
    def _named_pad_id(self) -> int:
        """Like `pad_id`, but ignores whether the model has a row for it."""
        pad_id = None if self.fast.pad_token is None else self.token_id(self.fast.pad_token)
        return self.eos_id if pad_id is None else pad_id

    def begin_with(self, begin: Sequence[int]) -> None:
        """Makes the tokenizer itself add `begin` before every text, also after it is saved and read by transformers."""
        if tuple(begin) != self.begin_ids:
            set_template(self.fast, begin)
            self.__dict__.pop("begin_ids", None)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, loadable by transformers 4.45 and later."""
        # Store the chat template in tokenizer_config.json: early transformers 4 does not read a separate file.
        self.fast.save_pretrained(str(directory), save_jinja_files=False)
        path = Path(directory) / "tokenizer_config.json"
        settings = json.loads(path.read_text("utf-8"))
        # transformers 5 writes a class name that transformers 4 does not know, and fields about how it was loaded.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = ["input_ids", "attention_mask"]  # transformers 4 would add token_type_ids
        settings["padding_side"] = self.fast.padding_side  # transformers omits it if it was changed
        more = settings.pop("extra_special_tokens", None)
        if isinstance(more, list):  # transformers 4 expects a mapping under this name, and the list under another
            settings["additional_special_tokens"] = more
        for key in ("backend", "is_local", "local_files_only"):
            settings.pop(key, None)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _is_character(spelled: bytes) -> bool:
    try:
        return len(spelled.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


def load_tokenizer(name: str, revision: str = "") -> Tokenizer:
    """Loads a tokenizer from a folder or the Hugging Face hub, or builds that of the embedded corpus (`synthetic`).

    Args:
      name: a folder with tokenizer.json (read without network access), a hub id such as
        `mistralai/Mistral-7B-v0.1`, or `synthetic`.
      revision: branch, tag or commit of a hub id.

    Raises:
      DataError: there is no tokenizer, it cannot be read, or it has no end-of-text token.
    """
    if not name:
        raise DataError("The tokenizer is missing. Set `data.tokenizer` to a folder, a hub id, or `synthetic`.")
    if name == SYNTHETIC:
        from quietstar_jax.data.synthetic import build_tokenizer

        return Tokenizer(name, build_tokenizer())
    folder = Path(name).expanduser()
    if folder.is_file():
        raise DataError(f"The tokenizer {name!r} is a file. Give its folder: {str(folder.parent)!r}.")
    if not folder.is_dir():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise DataError(f"There is no tokenizer folder {name!r}. Check the path, or give a hub id (`owner/name`).")
        folder = _download(name, revision)
    fast = _read_folder(folder)
    as_published(fast, folder)
    return Tokenizer(name, fast)


def _set_fields(value: Any) -> Any:
    """Removes fields that are null or false: a later version of the library may add such fields."""
    if isinstance(value, dict):
        return {name: _set_fields(item) for name, item in value.items() if item is not None and item is not False}
    return [_set_fields(item) for item in value] if isinstance(value, list) else value


def _read_folder(folder: Path) -> PreTrainedTokenizerFast:
    check_regular(folder)
    if (folder / _FILE).is_file():
        try:
            # Not AutoTokenizer: some of its classes rebuild the tokenizer from parts instead of using tokenizer.json.
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the Rust code raises bare Exceptions
            raise DataError(
                f"{folder / _FILE} (or another file of its folder) cannot be read as a tokenizer: {error}. Copy it "
                "again from its source, or save it again with transformers."
            ) from error
    there = ", ".join(sorted(item.name for item in folder.iterdir())) or "nothing"
    advice = f"{folder} has no {_FILE} (it has: {there})"
    if not any((folder / part).is_file() for part in ("tokenizer.model", "vocab.json")):
        raise DataError(f"{advice}. Save a tokenizer there with `save_pretrained`, or give another folder.")
    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the conversion of an old format can raise anything
        raise DataError(
            f"{advice}, and transformers cannot convert these files: {error}. Save it once with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)` on a machine that has `sentencepiece`."
        ) from error
    if not isinstance(converted, PreTrainedTokenizerFast):
        raise DataError(f"{advice}, and transformers has no fast version of it. Use a model with a {_FILE}.")
    return converted


def _download(name: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client raises many types of errors for a failed download
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"The tokenizer {name!r}{at} is not a folder here and cannot be fetched from the Hugging Face hub: "
            f"{reason.rstrip('.')}. Check the name and the network, log in if the model is gated (`hf auth login`), "
            "or download it elsewhere and give the folder."
        ) from error
