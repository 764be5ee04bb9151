"""Runs what the README and docs/ ask a user to type: every shell and Python block, in a folder that has what they name.

`python .ci/documented.py [--only TEXT] [README.md docs/data.md ...]` runs in the root of a checkout, after
`make quickstart`.
Commands are run as written. Only two things change: the long ones get settings that make them short, and what names a
file of the user's finds a small one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

SHORT = (
    "--config.logging.progress_bar=False --config.evaluation.batches=1 --config.evaluation.batch_size=8 "
    "--config.evaluation.every_steps=0 --config.data.sequence_length=24 --config.data.workers=0"
)
PHASES = "--config.phases[{i}].steps={steps} --config.phases[{i}].batch_size=8"
SHORT_PHASE = PHASES + " --config.phases[{i}].thought_length=2 --config.phases[{i}].tokens_ahead=2"
OWN = (
    "--config.model.checkpoint=path/to/hf-folder --config.data.train=\"('my_text/*.jsonl',)\" "
    "--config.data.validation=\"('my_text_held_out.jsonl',)\" --config.thought.chunk_megabytes=16 "
)
QUICK = " ".join([PHASES.format(i=0, steps=2), *(SHORT_PHASE.format(i=i, steps=1) for i in (1, 2))])
# Put behind the name of a configuration, so that what the text sets itself stays in force.
SETTINGS = {
    "configs/quickstart.py": f"{SHORT} {QUICK}",
    "configs/my_model.py": f"{SHORT} {OWN}{SHORT_PHASE.format(i=0, steps=1)} {SHORT_PHASE.format(i=1, steps=1)}",
    "configs/mistral_7b_openwebmath.py": f"{SHORT} {OWN}{SHORT_PHASE.format(i=0, steps=1)}",
    "configs/mistral_7b_c4.py": f"{SHORT} {OWN}{SHORT_PHASE.format(i=0, steps=1)}",
}
STUDY = """
from quietstar_jax.configs import quickstart
from quietstar_jax.studies.study import Study

def get_study():
    short = {"phases[0].steps": 2, "phases[1].steps": 1, "phases[2].steps": 1, "evaluation.batches": 1}
    small = {f"phases[{i}].batch_size": 4 for i in range(3)}
    variants = {"plain": {**short, **small, "phases[2].thought_length": 0}, "thoughts": {**short, **small}}
    return Study(base="configs/quickstart.py", variants=variants, baseline="plain", seeds=(0,))
"""
TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: held_out_questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
# What is added to a command that holds the text on the left; later flags take the place of earlier ones.
MORE = {
    "quietstar_jax.study --study": "--study short_study.py",
    "--workdir runs/controls --output": "",
    "quietstar_jax.report --checkpoint": "--limit 2 --page-tokens 200",
    "--tasks local": "--include_path tasks --limit 2",
    "--task gsm8k_cot": "--limit 2 --samples 2 --max-tokens 8 --batch-size 4 --records records.jsonl",
    "quietstar_jax.evaluate": "--limit 4 --batch-size 4",
    "benchmarks.": "",
}
ENVIRONMENT = {
    "--config.mesh.": {"JAX_NUM_CPU_DEVICES": "8"},
    # The least effort of the compiler: that it runs is what counts here.
    "quietstar_jax.aot": {"JAX_OPTIMIZATION_LEVEL": "O0", "JAX_MEMORY_FITTING_LEVEL": "O0"},
}
FIRST = (r"\.(train|data\.prepare) ", r"\.export ")
# Dry runs with variables that only the reader knows, and what needs the reader's account of the hub.
OTHERS = ("launch/slurm.sh", "launch/gke_jobset.sh", "--push")


def make_material() -> None:
    """What a reader has: a model, text, questions and prompts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    text = [line for line in Path("README.md").read_text().splitlines() if line.strip()]
    texts = [" ".join(text[i : i + 8]) for i in range(0, len(text), 8)] * 4
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, head_dim=8)
    config = MistralConfig(vocab_size=400, num_key_value_heads=2, max_position_embeddings=2048, **shape)
    for folder in map(Path, ("path/to/hf-folder", "path/to/hf-folder-or-hub-id")):
        MistralForCausalLM(config).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)

    def write(name: str, rows: list[dict]) -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    documents = [{"text": text} for text in texts]
    write("my_text/a.jsonl", documents)
    write("my_text_held_out.jsonl", documents[:8])
    Path("held_out.txt").write_text("\n\n".join(texts[:4]))
    Path("c4").mkdir(exist_ok=True)
    for i in range(2):
        with gzip.open(f"c4/{i}.json.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in documents))
    answers = [
        {"question": f"What is {i} + 2?", "answer": f"It is <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}"} for i in range(8)
    ]
    write("gsm8k/test.jsonl", answers)
    write("train.jsonl", answers)
    write("test.jsonl", answers)
    write("mine.jsonl", [{"prompt": f"{i} + 2?", "options": [str(i + 2), "no"], "key": 0} for i in range(8)])
    write("held_out_questions.jsonl", [{"question": f"{i} + 2?", "choices": [str(i + 2), "no"]} for i in range(4)])
    write("prompts.jsonl", [{"prompt": "One half of 14 is"}, {"prompt": "2 + 2 ="}])
    Path("short_study.py").write_text(STUDY)
    Path("tasks").mkdir(exist_ok=True)
    Path("tasks/local.yaml").write_text(TASK)


def blocks(document: Path) -> list[tuple[str, str]]:
    """(language, text) of every block that a reader would run; continued lines are one command."""
    found = []
    for language, body in re.findall(r"^```(sh|python)\n(.*?)^```", document.read_text(), re.M | re.S):
        if language == "python" or "done; wait" in body:
            found.append((language, body))
            continue
        lines = re.sub(r"\\\n\s*", "", body).splitlines()
        found += [("sh", line) for line in lines if line.strip() and not line.startswith("#")]
    return found


def shortened(command: str) -> str:
    command = re.sub(r"\s+\.\.\.$", "", re.sub(r"\s+#.*", "", command.strip()) if "\n" not in command else command)
    if command.startswith(("python ", "quietstar ")):
        command = ".venv/bin/" + command
    if command.startswith("pip "):
        command = ".venv/bin/python -m " + command
    command = re.sub(r"--tasks \S+", "--tasks local", command)  # the text's own tasks are on the hub
    if "quietstar_jax.aot" in command:
        return command
    for name, settings in SETTINGS.items():
        command = command.replace(f"--config {name}", f"--config {name} {settings}")
    return command + "".join(f" {more}" for text, more in MORE.items() if text in command)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents", nargs="*", type=Path)
    parser.add_argument("--only", default="", help="Only commands that hold this text.")
    parser.add_argument("--without", action="append", default=[], help="Not those that hold this text.")
    arguments = parser.parse_args()
    if not Path("my_text").exists():
        make_material()
    pages = arguments.documents or [Path("README.md")]
    every = dict.fromkeys(block for document in pages for block in blocks(document))  # what two pages say runs once
    chosen = [
        (language, body) for language, body in every
        if arguments.only in body and not any(text in body for text in (*arguments.without, "make ", *OTHERS))
    ]  # fmt: skip
    # Some folders are used before the section that makes them: text and training first, then the export, then the rest.
    chosen.sort(key=lambda block: next((i for i, text in enumerate(FIRST) if re.search(text, block[1])), len(FIRST)))
    failed = 0
    for language, body in chosen:
        command = shortened(body) if language == "sh" else body
        more = {
            name: value for text, values in ENVIRONMENT.items() if text in command for name, value in values.items()
        }
        run = ["bash", "-ceu", command] if language == "sh" else [".venv/bin/python", "-c", command]
        start = time.monotonic()
        ended = subprocess.run(
            run, env={**os.environ, **more}, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        wrong = ended.returncode != 0 or "Traceback" in ended.stderr
        failed += wrong
        print(f"{'FAILED' if wrong else 'ok'} ({time.monotonic() - start:.0f} s): {command.strip()[:160]}", flush=True)
        if wrong:
            print(ended.stdout[-1500:] + ended.stderr[-3000:], flush=True)
    print(f"{len(chosen) - failed} documented commands passed, {failed} failed")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
