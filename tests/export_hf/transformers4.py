"""Run by `test_transformers4.py` under another python: opens exported folders with the transformers installed there.

Needs torch and transformers, nothing of this project. Reads a request as JSON from standard input, and writes what the
folder gave as JSON to standard output.
"""

import json
import pathlib
import sys
import warnings

import torch
import transformers


def main() -> None:
    request = json.load(sys.stdin)
    answers = []
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for folder in request["folders"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        config = json.loads(pathlib.Path(folder, "config.json").read_text())
        # By default transformers 4 computes Gemma 2 without the soft cap of scores.
        capped = config.get("attn_logit_softcapping") and "auto_map" not in config
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True,
            **({"attn_implementation": "eager"} if capped else {}),
        )  # fmt: skip
        model.eval()
        tokens = torch.tensor([request["tokens"]])
        with torch.no_grad():
            logits = model(tokens).logits[0]
            generated = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False
            )
        answers.append(
            {
                "class": type(model).__name__,
                "dtype": str(model.dtype),
                "problems": [f"{key}: {value}" for key, value in report.items() if value],
                "ids": tokenizer(request["text"])["input_ids"],
                "plain": tokenizer.decode(tokenizer(request["text"])["input_ids"], skip_special_tokens=True),
                "chat": tokenizer.apply_chat_template([{"role": "user", "content": "two cats"}], tokenize=False),
                "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
                "tied": model.config.tie_word_embeddings,
                "logits": logits.tolist(),
                "generated": generated[0].tolist(),
            }
        )
    configs = {name: dict(fields) for name, fields in request["configs"]}
    read = {
        name: transformers.AutoConfig.for_model(fields.pop("model_type"), **fields) for name, fields in configs.items()
    }
    json.dump(
        {
            "version": transformers.__version__,
            "answers": answers,
            "configs": {name: value.to_dict() for name, value in read.items()},
        },
        sys.stdout,
        default=str,
    )


if __name__ == "__main__":
    main()
