"""transformers' ``Trainer``, whose processes have tokens of one batch instead of batches of their own.

    torchrun --nproc-per-node 2 examples/sequence_trainer.py

Two things are not as in other jobs: the model is compiled with ``packc.sequence``, and every process loads the same
batches. Run without torchrun, one process has all tokens; the losses are the same.
"""

import argparse
import tempfile
from itertools import islice

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling as Collator
from transformers import Mamba2Config, Mamba2ForCausalLM, Trainer, TrainingArguments

from packc.demo.data import documents, train_tokenizer  # your data here


class SameBatches(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        """Not accelerate's, which would hand each process other rows."""
        order = torch.Generator().manual_seed(self.args.seed)
        return DataLoader(
            self.train_dataset, self.args.train_batch_size, shuffle=True, generator=order, collate_fn=self.data_collator
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    texts = list(islice(documents(), options.steps * options.batch_size))
    tokenizer = train_tokenizer(texts, vocab_size=512)
    rows = [tokenizer(text, truncation=True, max_length=options.max_length) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            ddp_find_unused_parameters=False,
            use_cpu=not torch.cuda.is_available(),
        )
        torch.manual_seed(0)
        config = Mamba2Config(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden_size,
            num_hidden_layers=options.layers,
            state_size=16,
            num_heads=4,
            head_dim=options.hidden_size // 2,
            n_groups=2,
            use_cache=False,
        )
        model = Mamba2ForCausalLM(config)
        # Whoever made the arguments has started the processes' group.
        over_ranks = {"packc.sequence": dist.group.WORLD} if dist.is_initialized() else {}
        model.compile(backend="packc", options=over_ranks)
        collator = Collator(tokenizer, mlm=False)
        SameBatches(model, arguments, train_dataset=rows, data_collator=collator).train()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
