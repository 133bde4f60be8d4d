"""Batched generation from left-padded prompts, the prefill packed by one line: ``python examples/generate.py``.

The line is ``model.compile(backend="packc")``. ``generate`` calls the model itself: it knows nothing of what
``torch.compile(model)`` returns. The prompt runs packed and leaves every row's states, keys and values in the cache;
each further token runs as it would without packc.
"""

import argparse
import copy
from itertools import islice

import torch
from transformers import BambaConfig, BambaForCausalLM

import packc
from packc.demo.data import documents, train_tokenizer  # your data here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="batches of prompts")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=8)
    options = parser.parse_args()

    prompts = list(islice(documents(), options.steps * options.batch_size))
    tokenizer = train_tokenizer(prompts, vocab_size=512)
    tokenizer.padding_side = "left"  # a row must end in its last token

    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=4,
        mamba_d_head=options.hidden_size // 2,
        mamba_n_groups=1,
        mamba_d_state=16,
        attn_layer_indices=[options.layers - 1],
    )
    stock = BambaForCausalLM(config).eval()
    model = copy.deepcopy(stock)
    model.compile(backend="packc")
    torch._dynamo.config.recompile_limit = (
        16  # prompts and steps, of one row and of several, are graphs of one function
    )

    for number in range(options.steps):
        texts = prompts[number * options.batch_size :][: options.batch_size]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=options.max_length, return_tensors="pt")
        batch.pop("token_type_ids", None)
        greedy = {"max_new_tokens": options.new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        generated = model.generate(**batch, **greedy)
        same = torch.equal(generated, stock.generate(**batch, **greedy))
        print(f"prompts {tuple(batch['input_ids'].shape)}  tokens as stock's: {same}")
    done = packc.stats()
    print(f"prefill: {done['tokens']} of {done['padded_tokens']} positions in {done['steps']} packed calls")


if __name__ == "__main__":
    main()
