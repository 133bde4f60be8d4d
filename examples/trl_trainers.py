"""TRL's trainers on a tiny Mamba, packed by one line each: ``python examples/trl_trainers.py sft``.

The line is ``model.base_model.compile(backend="packc")``, before the trainer: since TRL 1.0 its trainers put a language
head of their own behind the model, in pieces, which no graph holds. ``sft`` pads, ``padding-free`` hands over rows of
several documents, ``dpo`` and ``reward`` compare two answers. Needs ``pip install -e ".[trainers]"``.
"""

import argparse
import copy
import tempfile
from itertools import islice

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, MambaConfig, MambaForCausalLM
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import packc
from packc.demo.data import documents, train_tokenizer  # your data here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=["sft", "padding-free", "dpo", "reward"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    texts = list(islice(documents(), options.steps * options.batch_size))
    tokenizer = train_tokenizer(texts, vocab_size=512)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(options, texts, tokenizer, folder)
        trainer.train()
        print(trainer.evaluate())
    print(packc.stats())


def made(options, texts, tokenizer, folder):
    size = {"vocab_size": len(tokenizer), "hidden_size": options.hidden_size, "num_hidden_layers": options.layers}
    how = {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "max_length": options.max_length,
        "learning_rate": 2e-3,
        "logging_steps": 10,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if options.trainer == "reward":
        config = LlamaConfig(**size, num_labels=1, num_attention_heads=2, intermediate_size=64, pad_token_id=0)
        model = LlamaForSequenceClassification(config)
    else:
        model = MambaForCausalLM(MambaConfig(**size, use_cache=False))
    model.base_model.compile(backend="packc")

    if options.trainer in ("sft", "padding-free"):
        rows = Dataset.from_dict({"text": texts})
        arguments = SFTConfig(**how, packing=options.trainer == "padding-free")
        return SFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows.take(4), processing_class=tokenizer)
    half = [len(text) // 2 for text in texts]
    answers = {"chosen": [t[n:] for t, n in zip(texts, half, strict=True)], "rejected": [t[::-1] for t in texts]}
    if options.trainer == "reward":
        rows = Dataset.from_dict(answers)
        arguments = RewardConfig(**how)
        return RewardTrainer(
            model, arguments, train_dataset=rows, eval_dataset=rows.take(4), processing_class=tokenizer
        )
    rows = Dataset.from_dict({"prompt": [t[:n] for t, n in zip(texts, half, strict=True)], **answers})
    reference = copy.deepcopy(model)
    reference.base_model.compile(backend="packc")
    arguments = DPOConfig(**how)
    data = {"train_dataset": rows, "eval_dataset": rows.take(4)}
    return DPOTrainer(model, reference, args=arguments, **data, processing_class=tokenizer)


if __name__ == "__main__":
    main()
