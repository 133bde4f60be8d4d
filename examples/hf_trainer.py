"""A Hugging Face ``Trainer`` run on padded batches, packed by one line: ``python examples/hf_trainer.py``.

The line is ``model.compile(backend="packc")``. ``TrainingArguments(torch_compile_backend="packc")`` is refused:
accelerate has a fixed list of backends.
"""

import argparse
import tempfile
from itertools import islice

import torch
from transformers import DataCollatorForLanguageModeling, MambaConfig, MambaForCausalLM, Trainer, TrainingArguments

from packc.demo.data import documents, train_tokenizer  # your data here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    texts = list(islice(documents(), options.steps * options.batch_size))
    tokenizer = train_tokenizer(texts, vocab_size=512)
    rows = [tokenizer(text, truncation=True, max_length=options.max_length) for text in texts]

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        use_cache=False,
    )
    model = MambaForCausalLM(config)
    model.compile(backend="packc")

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=2e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()


if __name__ == "__main__":
    main()
