"""Checkpoints out: what transformers and this package read back."""

from __future__ import annotations

import ast
import json
import logging
import math
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file

from quietstar_jax.checkpoint.run_checkpoint import open_run
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import CheckpointError
from quietstar_jax.export_hf import save as hf_save
from quietstar_jax.export_hf.added_tokens import add_tokens
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.files import open_checkpoint
from tests.checkpoint.saved import edit
from tests.export_hf.exports import DTYPES, tensors, write_checkpoint
from tests.hf.checkpoints import load_thinking
from tests.hf.runs import END, START, start_run
from tests.models.test_parity import VARIANTS, VOCAB, batch, our_logits, their_logits

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("llama tied", "float16"), ("mistral", "bfloat16"), ("qwen2", "float32"), ("qwen3 attention bias", "bfloat16"),
     ("llama mlp bias", "float32"), ("phi3 partial rotary", "bfloat16"),
     ("gemma2", "bfloat16"), ("gemma3_text two bases", "float32"), ("olmo2 tied", "bfloat16"),
     ("qwen3 windows yarn", "float32"), ("llama llama3 rope", "float32")],
)  # fmt: skip
def test_in_and_out_again_is_bit_identical(variant, dtype, tmp_path):
    source = write_checkpoint(tmp_path / "hf", variant, DTYPES[dtype])
    start_run(tmp_path / "run", source)
    export(tmp_path / "run", tmp_path / "base", ExportOptions("base", dtype))
    export(tmp_path / "run", tmp_path / "thinking", ExportOptions("quietstar", dtype))
    before, base, thinking = (tensors(tmp_path / name) for name in ("hf", "base", "thinking"))
    assert set(base) == set(before)
    for name, value in before.items():
        assert base[name].dtype == thinking[name].dtype == DTYPES[dtype]
        assert base[name].tobytes() == value.tobytes(), name
        assert thinking[name][: len(value)].tobytes() == value.tobytes(), name
    assert thinking["model.embed_tokens.weight"].shape[0] == VOCAB + 2
    # Out, in and out again, with the thoughts.
    start_run(tmp_path / "again", tmp_path / "thinking", keep_thoughts=True)
    export(tmp_path / "again", tmp_path / "twice", ExportOptions("quietstar", dtype))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("thinking", "twice")]
    assert configs[0] | {"text_vocab_size": VOCAB + 2} == configs[1]  # now the tokenizer has start and end
    for file in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "thinking" / file).read_bytes()


@pytest.mark.parametrize(
    "variant",
    [
        v
        for v in VARIANTS
        if v.split()[0] == v or v.endswith(("tied", "partial rotary", "windows yarn", "llama3 rope", "two bases"))
    ],
)
def test_base_loads_without_a_word_and_gives_our_logits(variant, tmp_path, caplog, recwarn):
    start_run(tmp_path / "run", write_checkpoint(tmp_path / "hf", variant))
    export(tmp_path / "run", tmp_path / "out", ExportOptions("base"))
    logging.getLogger("transformers").propagate = True
    warnings.simplefilter("always")
    with caplog.at_level(logging.WARNING):
        recwarn.clear()
        caplog.clear()  # of what the random model of the test is warned about
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not [record.getMessage() for record in caplog.records]
    assert not [str(warning.message) for warning in recwarn]
    assert not any(report.values()), report
    assert type(model).__name__ == transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").__class__.__name__

    tokens, mask = batch()
    ours = our_logits(tmp_path / "hf", tokens, mask)
    theirs = their_logits(model, tokens, mask)
    assert theirs.shape == ours.shape  # no row for start or end: nothing that could be predicted in the place of text
    assert np.abs(theirs - ours)[mask].max() < 1e-4
    assert not {START, END} & set(tokenizer.get_vocab())
    assert len(tokenizer) == len(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"))


def test_tokenizer_ids_follow_the_rows_of_the_model(run, tmp_path):
    export(run, tmp_path / "out", ExportOptions())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == VOCAB + 2
    assert tokenizer.convert_ids_to_tokens(VOCAB - 1) == f"<|unused_{VOCAB - 1}|>"
    assert tokenizer(f"w5 {START} w6 {END}").input_ids == [0, 5, VOCAB, 6, VOCAB + 1]
    assert tokenizer.decode([5, VOCAB, VOCAB - 1], skip_special_tokens=True) == "w5"
    again = load_tokenizer(str(tmp_path / "out"))
    assert add_tokens(again, VOCAB + 2, (START, END)) == (VOCAB, VOCAB + 1)
    assert again.token_id(f"<|unused_{VOCAB + 2}|>") is None


def test_tokens_that_the_tokenizer_has_keep_their_ids(tmp_path):
    source = write_checkpoint(tmp_path / "hf", known=(END, START))
    start_run(tmp_path / "run", source)
    for kind in ("base", "quietstar"):
        export(tmp_path / "run", tmp_path / kind, ExportOptions(kind))
    before, base, thinking = (tensors(tmp_path / name) for name in ("hf", "base", "quietstar"))
    end, start = VOCAB - 4, VOCAB - 3
    for name, value in before.items():
        assert base[name].tobytes() == thinking[name].tobytes() == value.tobytes(), name
    assert json.loads((tmp_path / "base/generation_config.json").read_text())["suppress_tokens"] == [
        start,
        end,
        VOCAB - 2,
        VOCAB - 1,
    ]
    assert json.loads((tmp_path / "quietstar/config.json").read_text())["thought_token_ids"] == [start, end]


def test_shards_hold_what_one_file_holds(run, tmp_path):
    export(run, tmp_path / "one", ExportOptions())
    export(run, tmp_path / "many", ExportOptions(max_shard_size="20KB"))
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3
    joined: dict[str, np.ndarray] = {}
    for file in files:
        part = load_file(file)  # of the safetensors library
        assert sum(value.nbytes for value in part.values()) <= 20_000
        assert not set(joined) & set(part)
        joined |= part
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert set(whole) == set(joined)
    assert all(whole[name].tobytes() == joined[name].tobytes() for name in whole)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", trust_remote_code=True)
    assert type(model).__name__ == "QuietStarLlamaForCausalLM"


def test_thoughts_are_read_back_as_they_were(run, tmp_path):
    export(run, tmp_path / "out", ExportOptions())
    _, state = start_run(tmp_path / "scaled", tmp_path / "out", keep_thoughts=True, embedding_scale=10.0)
    opened = open_checkpoint(str(tmp_path / "out"))
    same = load_thinking(opened, 100.0)
    stored = load_file(tmp_path / "out/model.safetensors")["start_embedding"]
    assert stored.shape == (2, 32)
    np.testing.assert_array_equal(same.start_embedding[...], stored[0])
    np.testing.assert_allclose(state.params["start_embedding"], 10 * stored[0], rtol=1e-6)
    np.testing.assert_array_equal(same.mixing_head.out[...], state.params["mixing_head.out"])


def test_the_model_card_says_how_it_was_trained(run, tmp_path):
    figures = {"loss_without_thoughts": 1.5, "loss_with_thoughts": 1.25, "tokens": 2810, "reward": 0.25}
    figures |= {"answer_accuracy_without_thoughts": 0.105, "answer_accuracy_with_thoughts": 1.0}
    records = [{"kind": "evaluation", "step": step, "phase": "thoughts"} | figures for step in (0, 7)]
    records[1]["loss_with_thoughts"] = 9.0  # of another step
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"kind": "eva')
    export(run, tmp_path / "out", ExportOptions())
    card = (tmp_path / "out/README.md").read_text()
    count = sum(map(math.prod, open_run(run).parameters.shapes.values()))
    for part in ("library_name: transformers", "trust_remote_code=True", "0 of 0 steps", "From `hf`", "2,810 tokens",
                 "| loss, nats per token | 1.5000 | 1.2500 |", '"embedding_scale": 100.0', "@article{zelikman2024",
                 "% of 400 questions | 10.5 (7.7 .. 13.9) | 100.0 (99.1 .. 100.0) |",
                 "| mean reward, nats | - | 0.2500",
                 f"family llama with 3 layers, 32 wide, 4 attention heads and {VOCAB} tokens: {count:,} parameters",
                 "derive from `hf`, whose licence (see its model card) applies"):  # fmt: skip
        assert part in card
    assert "next token right" not in card  # not measured
    assert "base_model" not in card
    assert "workdir" not in card
    stated = json.loads(card.split("```json")[1].split("```")[0])["model"]["architecture"]
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert (stated["vocab_size"], stated["hidden_size"]) == (VOCAB, exported["hidden_size"]) == (VOCAB, 32)
    assert exported["dtype"] == exported["torch_dtype"] == "float32"


def test_the_model_card_states_base_licence_and_picture(tmp_path):
    base = write_checkpoint(tmp_path / "hf")
    fields = "license: other\nlicense_name: 'llama3.2'\nlicense_link: LICENSE\nbase_model: x/y"
    (base / "README.md").write_text(f"---\n{fields}\n---\nlicense: mit\n")
    start_run(tmp_path / "run", base)
    record = tmp_path / "run/checkpoints/0/config/metadata"
    saved = json.loads(record.read_text())
    assert saved["license"] == {"license": "other", "license_name": "llama3.2"}  # the link leads into another folder
    saved["config"]["model"]["checkpoint"] = "owner/base"  # as if it came from the hub
    edit(record.parents[1], "config", json.dumps(saved | {"model_commit": "1234", "base_folder": ""}))
    (tmp_path / "drawn.svg").write_text("<svg/>")
    options = ExportOptions("base", picture=tmp_path / "drawn.svg")
    for _ in range(2):  # the second call finds it
        export(tmp_path / "run", tmp_path / "out", options)
    card = (tmp_path / "out/README.md").read_text()
    front = card.split("---")[1].split("\n")
    assert {"base_model: owner/base", "license: other", "license_name: llama3.2"} < set(front)
    assert "derive from `owner/base`, whose licence (llama3.2) applies" in card
    assert "](thought.svg)" in card
    assert (tmp_path / "out/thought.svg").read_text() == "<svg/>"
    (tmp_path / "drawn.svg").write_text("<svg></svg>")
    with pytest.raises(CheckpointError, match="exists already"):
        export(tmp_path / "run", tmp_path / "out", options)


def test_the_model_card_names_no_folder_of_this_machine(run, tmp_path):
    record = run / "checkpoints/0/config/metadata"
    saved = json.loads(record.read_text())
    text = ["/home/me/text/*.jsonl", "tfds:c4/en:train", "tfds:/home/me/a:test", "hf:~/b:train", "file:///home/me/c",
            "me/acme/*.txt"]  # fmt: skip
    saved["config"]["data"] |= {"train": text, "validation": ["../held_out"],
                                "data_dir": "~/tensorflow", "tokenizer": "someone/model"}  # fmt: skip
    edit(run / "checkpoints/0", "config", json.dumps(saved))
    export(run, tmp_path / "out", ExportOptions())
    card = (tmp_path / "out/README.md").read_text()
    assert not [part for part in (str(tmp_path), "/home", "../", "~", "acme") if part in card]
    shown = "Text: `*.jsonl`, `tfds:c4/en:train`, `tfds:a:test`, `hf:b:train`, `c`, `*.txt`"
    for part in (shown, '"held_out"', '"tensorflow"', '"tokenizer": "someone/model"'):
        assert part in card


def test_it_samples_and_stops_as_before_training(tmp_path):
    source = write_checkpoint(tmp_path / "hf")
    before = {"do_sample": True, "temperature": 0.5, "eos_token_id": [7, 1], "pad_token_id": 9, "max_length": 2048,
              "suppress_tokens": [4], "repetition_penalty": 1.1}  # fmt: skip
    (source / "generation_config.json").write_text(json.dumps(before | {"cache_implementation": "static"}))
    start_run(tmp_path / "run", source)
    export(tmp_path / "run", tmp_path / "out", ExportOptions("base"))
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    suppressed = [*range(VOCAB - 4, VOCAB), 4]  # rows without a token, then those of before
    stops = {"eos_token_id": [1, 7], "pad_token_id": 1, "bos_token_id": 0}
    assert written == before | stops | {"suppress_tokens": suppressed}
    export(tmp_path / "run", tmp_path / "thinking", ExportOptions())
    written = json.loads((tmp_path / "thinking/generation_config.json").read_text())
    assert written["suppress_tokens"] == [VOCAB, VOCAB + 1, *suppressed]
    (source / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        open_checkpoint(str(source))


def test_a_tokenizer_that_never_padded_pads_as_training_did(run, tmp_path):
    export(run, tmp_path / "out", ExportOptions("base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(["w5", "w5 w6"], padding=True).input_ids == [[1, 0, 5], [0, 5, 6]]
    start_run(tmp_path / "again", tmp_path / "out", keep_thoughts=False)
    configured = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    configured.pad_token = "w9"
    configured.save_pretrained(tmp_path / "hf")
    start_run(tmp_path / "padded", tmp_path / "hf")
    export(tmp_path / "padded", tmp_path / "out2", ExportOptions("base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out2")
    assert tokenizer(["w5", "w5 w6"], padding=True).input_ids == [[0, 5, 9], [0, 5, 6]]


def test_a_run_of_other_settings_exports_what_it_was(tmp_path):
    """The record of the checkpoint decides, not the defaults of today."""
    start_run(tmp_path / "run", write_checkpoint(tmp_path / "hf"), embedding_scale=7.0, start_token="<think>")
    export(tmp_path / "run", tmp_path / "out", ExportOptions())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["thought_embedding_scale"] == 7.0
    assert config["thought_length"] == 6
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<think>") == VOCAB


def test_the_torch_module_needs_nothing_of_ours():
    imported = set()
    for node in ast.walk(ast.parse(hf_save.MODULE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported <= {"__future__", "collections", "dataclasses", "typing", "torch", "transformers"}
