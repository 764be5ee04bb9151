"""What an export gives under transformers 4: the same logits, tokenizer, chat template and settings as here.

Runs where `QUIETSTAR_TRANSFORMERS4` names one or more pythons (separated by `:`) that have transformers 4.45 or later
and torch; skipped elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.config_json import architecture_from_hf
from tests.hf.real_layouts import write_layout
from tests.hf.runs import our_predictions, start_run
from tests.hf.test_config_json import FIELDS, left_out
from tests.models.test_parity import SIZES, VARIANTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PYTHONS = [python for python in os.environ.get("QUIETSTAR_TRANSFORMERS4", "").split(":") if python]
pytestmark = pytest.mark.transformers4

TEXT = "Two cats<|im_end|> sat, 42."
TOKENS = [40, 51, 62, 73, 84, 95, 106]
# Variant of `test_parity` -> layout of the tokenizer.
MODELS = {
    "llama tied": "smollm", "llama llama3 rope": "llama3", "mistral": "llama2",
    "qwen2": "qwen", "phi3": "llama2", "phi3 partial rotary": "llama2", "qwen3": "qwen", "gemma": "llama2",
    "gemma2": "llama2", "gemma3_text two bases": "llama2", "olmo2 tied": "smollm", "olmo3 two bases": "smollm",
}  # fmt: skip

TIED = ("llama tied", "phi3 partial rotary", "gemma", "gemma2", "olmo2 tied")
# First versions that compute a family or option; first versions that also compute it with thoughts.
SINCE = {"qwen3": (4, 51), "phi3 partial rotary": (4, 49), "gemma3_text": (4, 53), "olmo2": (4, 47), "olmo3": (4, 57)}
THINKS_SINCE = {"gemma2": (4, 53)}
# (family, field): defaults that differ between versions of transformers; published files have these fields.
OTHER_DEFAULTS = {
    *(("gemma2", field) for field in
      ("everything", "hidden_size", "intermediate_size", "num_key_value_heads", "query_pre_attn_scalar")),
    *(("olmo3", field) for field in ("everything", "rope_theta", "rope_parameters")),
}  # fmt: skip


def known_to(version: tuple[int, ...], variant: str, kind: str = "base") -> bool:
    """Whether a version of transformers has the family and option of a variant."""
    names = (variant, variant.split()[0])
    since = [table[name] for table in (SINCE, *[THINKS_SINCE] * (kind != "base")) for name in names if name in table]
    return all(version >= one for one in since)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Any]:
    """Runs of every variant, exported both ways, with the logits that we compute."""
    root, found = tmp_path_factory.mktemp("transformers4"), {}
    for variant, layout in MODELS.items():
        folder = root / variant.replace(" ", "-")
        size = write_layout(folder / "hf", layout)
        model = random_model(variant, size)
        model.save_pretrained(folder / "hf")
        run, state = start_run(folder / "run", folder / "hf")
        for kind in ("base", "quietstar"):
            export(folder / "run", folder / kind, ExportOptions(kind))
        _, mixed, plain = our_predictions(run, state, np.array([TOKENS]))
        found[variant] = {"folder": folder, "base": plain[0], "quietstar": mixed[0], "size": size}
    return found


def random_model(variant: str, vocab_size: int) -> Any:
    torch.manual_seed(0)
    fields = {**SIZES, **VARIANTS[variant], "vocab_size": vocab_size}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(variant.split()[0], **fields)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_((0.3 if weight.ndim == 1 else 0.1) * torch.randn_like(weight))
    return model


def ask(python: str, home: Path, folders: list[Path], configs: list[Any] | None = None) -> dict[str, Any]:
    request = {"folders": list(map(str, folders)), "tokens": TOKENS, "text": TEXT, "configs": configs or []}
    own = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    command = [python, str(Path(__file__).with_name("transformers4.py"))]
    done = subprocess.run(
        command, input=json.dumps(request), text=True, check=False, capture_output=True, env={**os.environ, **own}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.parametrize("python", PYTHONS)
def test_exports_are_what_they_are_here(exports, tmp_path, python):
    version = tuple(map(int, ask(python, tmp_path, [])["version"].split(".")[:2]))
    assert (4, 45) <= version < (5, 0)
    # Base first: a class of a folder takes the place of transformers' own for later folders of the same process.
    cases = [(v, kind) for kind in ("base", "quietstar") for v in MODELS if known_to(version, v, kind)]
    answers = ask(python, tmp_path, [exports[variant]["folder"] / kind for variant, kind in cases])["answers"]
    for (variant, kind), answer in zip(cases, answers, strict=True):
        case = exports[variant]
        folder, where = case["folder"] / kind, f"{variant}, {kind}"
        assert answer["problems"] == [], where
        assert answer["class"].startswith("QuietStar") == (kind == "quietstar"), where
        assert answer["tied"] == (variant in TIED), where
        ours = case[kind]
        theirs = np.array(answer["logits"])[:, : case["size"]]
        known_ids = ours > -1e30
        assert np.abs(theirs - ours)[known_ids].max() < 2e-4, where
        tokenizer = load_tokenizer(str(folder))
        here = transformers.AutoTokenizer.from_pretrained(folder)
        assert answer["ids"] == here(TEXT).input_ids, where
        assert answer["plain"] == here.decode(answer["ids"], skip_special_tokens=True), where
        assert answer["special"] == [here.bos_token, here.eos_token, here.pad_token], where
        chat = here.apply_chat_template([{"role": "user", "content": "two cats"}], tokenize=False)
        assert answer["chat"] == chat == "<|im_start|>user\ntwo cats<|im_end|>\n", where
        assert answer["dtype"] == "torch.float32", where
        assert len(answer["generated"]) > len(TOKENS), where
        assert answer["generated"][len(TOKENS)] == int(np.argmax(ours[-1])), where
        assert tokenizer.eos_id == here.eos_token_id


@pytest.mark.parametrize("python", PYTHONS)
def test_a_field_that_is_left_out_means_the_same(tmp_path, python):
    version = tuple(map(int, ask(python, tmp_path, [])["version"].split(".")[:2]))
    # transformers 4 knows no rope_parameters, and takes rotary scaling by its own name
    cases = {
        f"{family} {number} without {lacks}": {"model_type": family, **fields}
        for number, (family, fields, lacks) in enumerate(left_out())
        if "rope_parameters" not in fields and not lacks.endswith("null") and known_to(version, family)
        and lacks not in ("num_attention_heads", "num_hidden_layers") and lacks != "layer_types"
    }  # fmt: skip
    read = ask(python, tmp_path, [], list(cases.items()))["configs"]
    assert len(read) > 40
    assert {name.split()[0] for name in read} == {family for family in FIELDS if known_to(version, family)}
    wrong = []
    for name, complete in read.items():
        ours = read_or_none(cases[name])
        theirs = read_or_none({key: value for key, value in complete.items() if key != "layer_types" or value})
        wrong += [(name.split()[0], name.split()[-1])] if ours != theirs else []
    assert not set(wrong) - OTHER_DEFAULTS


def read_or_none(fields: dict[str, Any]) -> Any:
    from quietstar_jax.errors import ConfigError

    try:
        return architecture_from_hf(fields)
    except ConfigError:
        return None
