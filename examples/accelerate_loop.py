"""A loop under ``accelerate``, packed by one line: ``accelerate launch examples/accelerate_loop.py``, or ``python``.

The line is ``model.compile(backend="packc")``, before ``prepare``. Ranks have batches of other token counts: each loss
is divided by the labels of all ranks, as ``Trainer`` does, so that every token weighs the same.
"""

import argparse
from itertools import islice

import torch
from accelerate import Accelerator
from transformers import MambaConfig, MambaForCausalLM

from packc.demo.data import documents, padded_batches, train_tokenizer  # your data here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    accelerator = Accelerator()
    tokenizer = train_tokenizer(list(islice(documents(), 1000)), vocab_size=512)
    shape = {"batch_size": options.batch_size, "max_length": options.max_length}
    batches = padded_batches(documents(), tokenizer, **shape)
    batches = islice(batches, accelerator.process_index, None, accelerator.num_processes)

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        use_cache=False,
    )
    model = MambaForCausalLM(config)
    model.compile(backend="packc")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-3))

    for step, batch in enumerate(islice(batches, options.steps), start=1):
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        labels = (batch["labels"][:, 1:] != -100).sum()
        of_all_ranks = accelerator.reduce(labels, "sum")
        loss = model(**batch, num_items_in_batch=of_all_ranks).loss
        accelerator.backward(loss * accelerator.num_processes)  # whose gradients are averaged over ranks
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            mean = accelerator.reduce(loss.detach(), "sum")
            accelerator.print(f"step {step:3}  loss {mean.item():.3f}")


if __name__ == "__main__":
    main()
