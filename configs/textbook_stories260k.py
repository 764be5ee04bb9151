"""A real pretrained model and real text, small enough for two cores: a 260 K Llama continued on mathematics textbooks.

It reads three paths below the current folder; put your files there, or set the paths (`--config.model.checkpoint`,
`--config.data.train`, `--config.data.validation`):

- `data/stories260k`: karpathy/tinyllamas' stories260K as a Hugging Face folder, or any other small model;
- `data/textbooks/*.jsonl` and `data/textbooks_held_out.jsonl`: lines with a `text`, as docs/data.md describes.
"""

import ml_collections

from quietstar_jax.config import default_config, phase


def get_config() -> ml_collections.ConfigDict:
    """100 steps of the paper's recipe, at a learning rate for a model of this size."""
    config = default_config()
    config.workdir = "runs/textbook_stories260k"
    config.model.checkpoint = "data/stories260k"

    architecture = config.model.architecture  # that of the checkpoint, for planning without it
    architecture.vocab_size = 512
    architecture.hidden_size = 64
    architecture.intermediate_size = 172
    architecture.num_layers = 5
    architecture.num_heads = 8
    architecture.num_kv_heads = 4
    architecture.head_dim = 8
    architecture.max_positions = 512
    architecture.tie_embeddings = True

    config.data.train = ("data/textbooks/*.jsonl",)
    config.data.validation = ("data/textbooks_held_out.jsonl",)
    config.data.sequence_length = 256
    config.thought.initial_start_token = "."  # the tokenizer, made for children's stories, has no "---"
    config.thought.initial_end_token = "."
    config.phases = [
        phase(name="thoughts", steps=100, batch_size=8, thought_length=5, num_thoughts=2, tokens_ahead=4,
              policy_weight=1.0, learning_rate=1e-3, warmup_steps=20),
    ]  # fmt: skip
    config.evaluation.every_steps = 25
    config.evaluation.batches = 8
    config.checkpoint.every_steps = 25
    return config
