"""A plain PyTorch training loop on padded batches, packed by one line: ``python examples/train_loop.py``.

The line is ``torch.compile(model, backend=packc.backend)``. Model, collator and loop know nothing of packing.
"""

import argparse
from itertools import islice
from time import perf_counter

import torch
from transformers import MambaConfig, MambaForCausalLM

import packc
from packc.demo.data import documents, padded_batches, train_tokenizer  # your data here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    tokenizer = train_tokenizer(list(islice(documents(), 1000)), vocab_size=512)
    batches = padded_batches(documents(), tokenizer, batch_size=options.batch_size, max_length=options.max_length)

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        use_cache=False,
    )
    model = MambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    print(packc.explain(model)(**next(batches)))  # what packc will do, and why not where it will not

    model = torch.compile(model, backend=packc.backend)
    start = perf_counter()
    for step, batch in enumerate(islice(batches, options.steps), start=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            shape = tuple(batch["input_ids"].shape)
            print(f"step {step:3}  {perf_counter() - start:6.1f} s  batch {shape}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
