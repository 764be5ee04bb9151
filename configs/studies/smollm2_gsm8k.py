"""Controls for what a pretrained model gains from thoughts on real text.

`python -m quietstar_jax.study --study configs/studies/smollm2_gsm8k.py --workdir runs/smollm2_gsm8k_study`

All variants of a seed share the plain training. The study compares losses over all tokens. To compare only the results
of calculations, measure each run with `evaluate --task spans`; `--against FILE` compares it with the records of another
run (docs/evaluation.md).
"""

from quietstar_jax.studies.study import Study, controls

BASE = "configs/smollm2_gsm8k.py"
PLAIN = {  # the phases with thoughts become plain language modelling
    "phases[1].thought_length": 0, "phases[2].thought_length": 0,
}  # fmt: skip


def get_study() -> Study:
    """Returns the study: the run with thoughts and every control."""
    return Study(
        base=BASE,
        baseline="thoughts",
        variants={
            "thoughts": {},
            **controls(BASE, PLAIN, phase=2),
        },
        metrics=("loss_without_thoughts", "loss_with_thoughts"),
    )
