"""Pre-trains a small base model on real text: textbooks (OpenStax) and worked problems (GSM8K).

It reads paths below the current folder; put your files there, or set the paths (`--config.data.tokenizer`,
`--config.data.train`, `--config.data.validation`):

- `data/textbooks/*.jsonl` and `data/textbooks_held_out.jsonl`: lines with a `text` (docs/data.md). Those of
  docs/results.md are OpenStax books, the last revisions under CC BY 4.0, converted to text with formulas in LaTeX;
- `data/textbooks_tokenizer`: a tokenizer with 4,096 ids, trained on this text (a minute with `tokenizers`).

GSM8K is read as a tensorflow-datasets dataset, built once from its published files:
`python -m quietstar_jax.data.build gsm8k --data-dir ~/tensorflow_datasets --split train=gsm8k/train.jsonl`
"""

import ml_collections

from quietstar_jax.config import default_config, phase


def get_config() -> ml_collections.ConfigDict:
    """A Llama with 4.2 M parameters, trained on 4.1 M of the 9.4 M available tokens."""
    config = default_config()
    config.workdir = "runs/textbooks_base"

    architecture = config.model.architecture
    architecture.vocab_size = 4096
    architecture.hidden_size = 256
    architecture.intermediate_size = 768
    architecture.num_layers = 4
    architecture.num_heads = 8
    architecture.num_kv_heads = 4
    architecture.head_dim = 32
    architecture.max_positions = 1024
    architecture.tie_embeddings = True
    architecture.initializer_range = 0.0625  # 1/sqrt(hidden_size): a small model learns far sooner

    config.data.tokenizer = "data/textbooks_tokenizer"
    config.data.train = ("data/textbooks/*.jsonl", "tfds:gsm8k:train")
    config.data.validation = ("data/textbooks_held_out.jsonl",)
    config.data.sequence_length = 256
    config.data.packing = "packed"

    config.thought.initial_start_token = "<<"  # GSM8K's worked problems hold calculations: <<48/2=24>>
    config.thought.initial_end_token = ">>"
    config.optimizer.weight_decay = 0.01
    config.phases = [
        phase(name="pretrain", steps=500, batch_size=32, thought_length=0, learning_rate=3e-3, warmup_steps=60,
              decay="cosine", final_rate_fraction=0.03),
    ]  # fmt: skip
    config.evaluation.every_steps = 250
    config.evaluation.thought_length = 8
    config.evaluation.batches = 2
    config.checkpoint.every_steps = 100
    config.logging.every_steps = 10
    return config
