"""A pretrained model learns to think on real text: SmolLM2-135M-Instruct, GSM8K, with calculations as thoughts.

Half of the training solutions write their calculations between marks (`sold <<48/2=24>> 24 clips`), the others give
only the results (`sold 24 clips`). Plain training adapts the model to both; then it learns to think the calculations.
`make real` runs it with 100 plain steps, and without the last phase. Build the data once, from the hub, or from GSM8K's
published files with `--split train=train.jsonl --split test=test.jsonl`:

`python -m quietstar_jax.data.build gsm8k_text --data-dir data/real`
"""

import ml_collections

from quietstar_jax.config import default_config, phase
from quietstar_jax.configs.smollm2_135m_lora import smollm2_135m


def get_config() -> ml_collections.ConfigDict:
    """Plain training on 614,400 tokens; then one step that only centres the mixing head; then REINFORCE.

    The model thinks usefully before REINFORCE: it has read calculations, and the mixing starts with the weight 0.27.
    The gain in docs/results.md was measured there, without the last phase, as `make real` does. The last phase is for
    experiments: so far, REINFORCE has not made thoughts better (docs/results.md).

    So that CPUs can run it, few positions think: where a calculation is likely to begin, in texts without written ones.
    Evaluate with `--reach 4 --think start:0.01`: a thought is then used for four tokens, usually the whole result.
    """
    config = default_config()
    config.workdir = "runs/smollm2_gsm8k"
    config.model.checkpoint = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.frozen_dtype = "float32"
    smollm2_135m(config)
    config.model.adapters.update(maps="all", rank=16, alpha=32.0)

    config.data.data_dir = "data/real"
    config.data.train = ("tfds:gsm8k_text:train",)
    config.data.validation = ("tfds:gsm8k_text:test",)
    config.data.sequence_length = 256  # nearly all problems are shorter
    config.data.packing = "packed"

    config.thought.initial_start_token = " <<"
    config.thought.initial_end_token = ">>"
    config.thought.end = "token"  # after adapting, the model itself ends a calculation with >>
    config.thought.sampling_temperature = 0.7
    config.thought.mixing = "probabilities"  # a wrong calculation then costs little
    config.thought.center_mixing_head = True
    config.thought.positions = "start"  # in texts without written calculations, where the model would begin one
    config.thought.position_fraction = 0.03
    # The positions that think are those at which the text could have had a mark, but has none. The loss with thoughts
    # would count these more than others, and teach the model to begin no calculations (docs/results.md).
    config.thought.base_loss_weight = 1.0
    config.thought.talk_loss_weight = 0.0
    config.thought.positive_only = False  # with it, the gradient of the policy term is about four times as large
    config.thought.chunk_megabytes = 1_024

    thinking = dict(batch_size=8, thought_length=12, tokens_ahead=4, warmup_steps=0, learning_rate=1e-4)
    config.phases = [
        phase(name="adapt", steps=300, batch_size=8, thought_length=0, learning_rate=1e-3, warmup_steps=5,
              decay="cosine", final_rate_fraction=0.1),
        phase(name="center_the_mixing_head", steps=1, num_thoughts=1, policy_weight=0.0,
              **thinking | {"learning_rate": 0.0}),
        phase(name="thoughts", steps=40, num_thoughts=2, policy_weight=0.1, fresh_optimizer=True,
              rates={"adapters": 1.0, "mixing_head": 0.0, "thought_embeddings": 0.01}, **thinking),
    ]  # fmt: skip
    config.evaluation.every_steps = 0
    config.evaluation.batches = 4
    config.evaluation.batch_size = 2
    config.evaluation.reach = 4
    config.evaluation.think = "start:0.01"
    config.checkpoint.every_steps = 20
    return config
