"""Tokenizers from folders: exact round trips, no additions, and errors that say what to do."""

import json
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quietstar_jax.data import tokenization
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.errors import DataError

TEXTS = ["The cat sat on the mat.", "Two cats sat; three mats.", "  spaces  and\n\nlines\t"]


def backend(special: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE with a post-processor, truncation and padding that must all stay without effect."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    if "<s>" in special:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(4)
    bpe.enable_padding(length=16, pad_token=special[-1], pad_id=len(special) - 1)
    return bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    backend(["<s>", "</s>"]).save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


def test_ids_and_sizes(tokenizer: Tokenizer, folder: Path) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert tokenizer.name == str(folder)
    assert tokenizer.vocab_size == len(tokenizer.fast)
    assert tokenizer.token_id("</s>") == 1
    assert tokenizer.token_id("not a token") is None


def test_pad_token_where_there_is_one() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend(["</s>", "<pad>"]), eos_token="</s>", pad_token="<pad>")
    found = Tokenizer("mine", fast)
    assert (found.bos_id, found.eos_id, found.pad_id) == (None, 0, 1)


def test_vocab_size_covers_added_tokens() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend(["</s>"]), eos_token="</s>")
    before = Tokenizer("mine", fast).vocab_size
    fast.add_tokens(["<|think|>"])
    after = Tokenizer("mine", fast)
    assert after.vocab_size == before + 1
    assert after.token_id("<|think|>") == before
    assert after.encode("<|think|>") == [before]


def test_encode_adds_and_cuts_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[0] * 10)
    assert len(ids) > 16
    assert 0 not in ids
    assert 1 not in ids
    assert tokenizer.encode("") == []
    assert ids == tokenizer.fast(TEXTS[0] * 10, add_special_tokens=False)["input_ids"]


def test_other_threads_run_while_a_text_is_encoded(tokenizer: Tokenizer) -> None:
    worker = threading.Thread(target=tokenizer.encode, args=(TEXTS[0] * 20_000,))
    begin, turns = time.perf_counter(), 0
    worker.start()
    while worker.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 20 * (time.perf_counter() - begin)  # about a thousand a second; hardly any if it blocks


def test_special_tokens_in_text_and_in_decoding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("cat</s>")
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == "cat</s>"


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=60).filter(lambda text: "s>" not in text))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pickle_and_save(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    settings_written = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings_written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in settings_written
    assert "local_files_only" not in settings_written
    copies = [load_tokenizer(str(tmp_path / "saved")), pickle.loads(pickle.dumps(tokenizer))]
    for copy in copies:
        assert copy.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
        assert (copy.eos_id, copy.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    stock = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert stock(TEXTS[1], add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXTS[1])


def test_fingerprint(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).fingerprint() == tokenizer.fingerprint()
    content, config = json.loads((folder / "tokenizer.json").read_text()), {"bos_token": "<s>", "eos_token": "</s>"}
    first, second = content["added_tokens"]
    swapped = {**content["model"]["vocab"], "a": content["model"]["vocab"]["b"], "b": content["model"]["vocab"]["a"]}
    changed = [
        ({**content, "model": {**content["model"], "vocab": swapped}}, config),
        ({**content, "model": {**content["model"], "merges": content["model"]["merges"][:-1]}}, config),
        ({**content, "added_tokens": [{**first, "lstrip": True}, second]}, config),
        ({**content, "normalizer": {"type": "NFC"}}, config),
        ({**content, "decoder": None}, config),
        ({**content, "post_processor": None}, config),  # no longer begins texts
        (content, {**config, "eos_token": "<s>"}),
    ]  # fmt: skip
    found = {tokenizer.fingerprint()}
    for number, (file, settings_) in enumerate(changed):
        path = tmp_path / str(number)
        path.mkdir()
        (path / "tokenizer.json").write_text(json.dumps(file))
        (path / "tokenizer_config.json").write_text(json.dumps(settings_))
        found.add(load_tokenizer(str(path)).fingerprint())
    assert len(found) == 1 + len(changed)


def test_synthetic() -> None:
    found = load_tokenizer("synthetic")
    assert found.name == "synthetic"
    assert found.eos_id < found.vocab_size


def test_folder_needs_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(tokenization, "snapshot_download", refuse)
    load_tokenizer(str(folder), revision="main")


def test_hub_files_are_read_like_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "tokenizer*" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(tokenization, "snapshot_download", download)
    assert load_tokenizer("owner/model", "v1").name == "owner/model"
    assert load_tokenizer("gpt", "").eos_id == 1
    assert asked == [("owner/model", "v1", True), ("gpt", None, True)]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(tokenization, "snapshot_download", unreachable)
    with pytest.raises(DataError, match=r"'owner/model' at revision 'v1'.*no route to host\. Check.*give the folder"):
        load_tokenizer("owner/model", "v1")


def write(folder: Path, **files: str) -> str:
    for name, content in files.items():
        (folder / name.replace("_json", ".json").replace("_model", ".model")).write_text(content)
    return str(folder)


def test_errors(tmp_path: Path, folder: Path) -> None:
    def fails(name: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_tokenizer(name)

    fails("", "tokenizer is missing")
    fails(str(tmp_path / "absent"), "no tokenizer folder .*absent")
    fails("./absent", "no tokenizer folder")
    fails("a/b/c", "no tokenizer folder")
    fails(str(folder / "tokenizer.json"), "is a file. Give its folder")
    fails(str(tmp_path), r"has no tokenizer.json \(it has: nothing\)")
    fails(write(tmp_path, tokenizer_model="not sentencepiece"), "transformers cannot convert")
    fails(write(tmp_path, tokenizer_json="{}"), "tokenizer.json .*cannot be read as a tokenizer")
    backend(["</s>"]).save(str(tmp_path / "tokenizer.json"))
    fails(str(tmp_path), "has no end-of-text token.*tokenizer_config.json")


def test_end_of_text_outside_the_vocabulary() -> None:
    class Names:
        backend_tokenizer = backend(["</s>"])
        eos_token = "<end>"

    with pytest.raises(DataError, match="names '<end>' as its end of text, but does not contain it"):
        Tokenizer("mine", Names())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "openstax-4k"])
def test_real_tokenizers_match_their_file(name: str) -> None:
    folder = Path(os.environ.get("QUIETSTAR_MATERIAL", "/nonexistent")) / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("QUIETSTAR_MATERIAL does not hold this tokenizer")
    found = load_tokenizer(str(folder))
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("---", "  Solve $x + 1 = 2$.\n\nSolution: 1", "naïve 你好 </s>"):
        assert found.encode(text) == raw.encode(text, add_special_tokens=False).ids
    assert found.eos_id == 2
    assert found.pad_id == 2
    assert found.bos_id == 1
