"""A stock Hugging Face Mamba, compiled with packc, by PackMamba's protocol: packed, padded, one sequence at a time.

The widths of the 130M and the 1.4B models with few layers, bf16, forward, loss and backward of the same documents. A
fourth contender is the stock model in eager mode, without packc, on as many documents one at a time as there is time
for. Where Inductor fails, packc's graph runs with ``aot_eager``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import cases  # noqa: F401  (finds what the following imports)
import torch
from packmamba import VOCABULARY, draw_documents, steps_of, timed
from telling import device, each, is_lost, parser, said, synchronize
from transformers import MambaConfig, MambaForCausalLM

import packc

MODELS = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 6},
    "1.4b": {"hidden_size": 2048, "num_hidden_layers": 4},
}
TINY = {"tiny": {"hidden_size": 32, "num_hidden_layers": 1}}
DOCUMENTS, OF_STOCK = 16, 2
WAYS = ("packed", "padded", "single", "stock")
SAME = 2e-2  # between losses of one model in bf16


def main() -> None:
    args = parser(__doc__).parse_args()
    models = TINY if args.dry else MODELS
    told: dict[str, dict[str, Any]] = {name: {} for name in models}

    def facts_of(case: str) -> dict[str, Any]:
        name, way = case.split()
        facts = told[name][way] = measured(name, way, args.dry)
        loss = told[name].get("packed", facts)["loss"]
        agree = way == "stock" or abs(facts["loss"] - loss) <= SAME * abs(loss)
        return facts | {
            "ok": agree,
            "why": "" if agree else f"loss {facts['loss']:.4f}, packed {loss:.4f}",
            "about": name,
            "line": line(name, told[name]),
        }

    each(args, [f"{name} {way}" for name in models for way in WAYS], facts_of)


def line(name: str, told: dict[str, dict[str, Any]]) -> str:
    speeds = {way: facts["tokens_per_second"] for way, facts in told.items()}
    words = [f"{way} {speed / 1e3:.3g}k" for way, speed in speeds.items()]
    if "packed" in speeds:
        packed = speeds.pop("packed")
        words += [f"packed is {packed / speed:.2f}x {way}" for way, speed in speeds.items()]
    inner = {facts["inner"] for facts in told.values() if "inner" in facts} - {"inductor"}
    return f"{name} tokens/s: {', '.join(words)}" + (f" ({', '.join(inner)})" if inner else "")


@cache
def model_and_documents(name: str, dry: bool) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    sizes = (TINY if dry else MODELS)[name]
    config = MambaConfig(**sizes, vocab_size=64 if dry else VOCABULARY, use_cache=False)
    model = MambaForCausalLM(config).to(device(dry), torch.float32 if dry else torch.bfloat16).train()
    scale = 0.05 if dry else 1
    return model, draw_documents(3 if dry else DOCUMENTS, config.vocab_size, device(dry), scale)


def small_steps(name: str) -> list[Callable[[], torch.Tensor]]:
    """On the CPU, what the model launches on few tokens: of its widths, with one layer and few words."""
    config = MambaConfig(**(MODELS[name] | {"num_hidden_layers": 1}), vocab_size=64, use_cache=False)
    model = MambaForCausalLM(config).to(torch.bfloat16).train()
    documents = [torch.randint(1, config.vocab_size, (length,)) for length in (50, 130, 300)]
    compiled = torch.compile(model, backend=packc.backend, options={"packc.inner": "aot_eager"})
    return [steps_of(compiled, documents)[way] for way in ("packed", "padded", "single")]


def measured(name: str, way: str, dry: bool) -> dict[str, Any]:
    model, documents = model_and_documents(name, dry)
    if way == "stock":
        documents = documents[:OF_STOCK]
        return _timed(model, steps_of(model, documents)["single"], documents, steps=2)
    began = time.perf_counter()
    why: dict[str, str] = {}
    for inner in ("aot_eager",) if dry else ("inductor", "aot_eager"):
        try:
            compiled = torch.compile(model, backend=packc.backend, options={"packc.inner": inner})
            step = steps_of(compiled, documents)[way]
            for _ in range(2):
                step()
            synchronize()
        except Exception as error:
            if is_lost(error) or inner == "aot_eager":
                raise
            torch._dynamo.reset()
            why[inner] = said(error)
        else:
            first = round(time.perf_counter() - began, 1)
            return _timed(model, step, documents, 2 if dry else 8) | {"inner": inner, "compile_s": first, "failed": why}
    raise AssertionError("unreachable")


def _timed(model: Any, step: Callable[[], torch.Tensor], documents: list[torch.Tensor], steps: int) -> dict[str, Any]:
    model.zero_grad()
    loss = step().item()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = sorted(timed(step, model, documents[0].device) for _ in range(steps))
    median, tokens = times[len(times) // 2], sum(map(len, documents))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"loss": loss, "step_s": median, "tokens": tokens, "tokens_per_second": tokens / median, "peak_gib": peak}


if __name__ == "__main__":
    main()
