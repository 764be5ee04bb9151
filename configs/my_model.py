"""Trains your own model to think, on your own text: copy this file and edit the lines marked <-.

    python -m quietstar_jax.train --config configs/my_model.py

Before a long run, `python -m quietstar_jax.aot --config configs/my_model.py --topology gpu:h100x1` says whether it
fits in memory (docs/pods.md). docs/scaling.md has starting points by model size.
"""

import ml_collections

from quietstar_jax.config import default_config, phase


def get_config() -> ml_collections.ConfigDict:
    """First the mixing head learns to use thoughts, then REINFORCE trains them."""
    config = default_config()
    config.workdir = "runs/my_model"  # <- a run with the same folder resumes

    # The model: a folder with config.json, tokenizer.json and safetensors, a hub id, or the work directory of a run.
    config.model.checkpoint = "path/to/hf-folder-or-hub-id"  # <-
    # config.model.revision = "main"  # branch, tag or commit of a hub id
    config.model.compute_dtype = "bfloat16"  # weights, losses and rewards stay float32
    config.model.rematerialize = True  # less memory, about a third more arithmetic in the layers

    # The text: .jsonl (field `text`), .csv or .txt, also compressed, or .parquet; globs, folders, URLs (docs/data.md).
    config.data.train = ("my_text/*.jsonl",)  # <-
    config.data.validation = ("my_text_held_out.jsonl",)  # <- text that is not in `train`
    # config.data.text_key = "content"  # if the text is in another field
    # config.data.train, config.data.weights = ("my_text/*.jsonl", "hf:allenai/c4/en:train"), (0.7, 0.3)  # a mixture
    config.data.sequence_length = 256
    config.data.packing = "packed"  # all text, end to end; `random_span` = one span of each document, as in the paper

    # Out of memory? Try, in this order: smaller chunks, more microbatches per phase, adapters, a sharded mesh.
    config.thought.chunk_megabytes = 1_024  # for the activations of thoughts; larger is faster
    # config.model.adapters.update(maps="all", rank=16, alpha=32.0)  # LoRA on a frozen bfloat16 base
    # config.mesh.update(data=1, fsdp=-1)  # several devices: every weight is sharded over all of them

    # Too slow? Let only a part of the positions think in training; the smaller the part, the lower the cost.
    # config.thought.positions, config.thought.position_fraction = "random", 0.25

    # Another objective? docs/objectives.md
    # config.thought.advantage, config.thought.positive_only = "leave_one_out", False

    decoder = "decoder" if config.model.adapters.maps == "none" else "adapters"  # what the opening leaves as it is
    thinking = dict(batch_size=8, thought_length=9, num_thoughts=2, tokens_ahead=4)  # the paper's (12, 4)
    config.phases = [
        phase(name="opening", steps=30, policy_weight=0.0, learning_rate=1e-3,
              rates={decoder: 0.0, "thought_embeddings": 0.0}, **thinking),
        # The paper's rates for 7 B. Smaller models and adapters need larger rates, and then a smaller policy_weight.
        phase(name="thoughts", steps=100, policy_weight=1e6, learning_rate=1e-6, fresh_optimizer=True, **thinking),
    ]  # fmt: skip
    config.evaluation.every_steps = 25
    config.checkpoint.every_steps = 50
    return config
