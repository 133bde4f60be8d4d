"""PackMamba's protocol on a stock MambaForCausalLM: one sequence at a time, padded, and packed.

Documents have log-normal lengths of mean about 646, clipped to [57, 2048], as in the paper (arXiv 2408.03865). A step
is forward, loss and backward over the same documents, three ways, all of them compiled with packc, on its kernels:

    single   each document alone, as a batch of one
    padded   all in one batch padded to the longest, without a mask, so that nothing is left out
    packed   the same batch with its mask

Prints real tokens a second and how many times as many as ``single``; writes ``packmamba-<device>.csv`` and ``.png``.
Without a GPU, and without ``--device cpu`` or ``--quick``, it says so and does nothing: these models are for GPUs.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

import packc

MODELS = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 24},
    "370m": {"hidden_size": 1024, "num_hidden_layers": 48},
    "1.4b": {"hidden_size": 2048, "num_hidden_layers": 48},
    "2.8b": {"hidden_size": 2560, "num_hidden_layers": 64},
    "quick": {"hidden_size": 32, "num_hidden_layers": 1},
}
VOCABULARY = 50280
MEAN, SHORTEST, LONGEST = 646, 57, 2048
RESULTS = Path(__file__).parent / "results"

Step = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["130m", "1.4b"], help=f"some of: {', '.join(MODELS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else None)
    parser.add_argument("--documents", type=int, default=16, help="in a step")
    parser.add_argument("--steps", type=int, default=10, help="timed, of each way")
    parser.add_argument("--quick", action="store_true", help="a tiny model on short documents: tries this script")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV and the plot")
    args = parser.parse_args()
    for name in args.models:
        if name not in MODELS:
            parser.error(f"no model {name!r}: choose from {', '.join(MODELS)}")
    if args.device is None and not args.quick:
        print("No GPU here: nothing is measured. --device cpu does it all the same, --quick tries the script.")
        return
    device = torch.device(args.device or "cpu")
    rows = []
    for name in ["quick"] if args.quick else args.models:
        rows += measure(name, args.documents, args.steps, device)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"packmamba-{device.type}.csv"
    with file.open("w", newline="") as out:
        table = csv.DictWriter(out, rows[0])
        table.writeheader()
        table.writerows(rows)
    draw(rows, file.with_suffix(".png"))
    print(f"Written: {file}, {file.with_suffix('.png').name}")


def measure(name: str, count: int, steps: int, device: torch.device) -> list[dict[str, object]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    quick = name == "quick"
    config = MambaConfig(**MODELS[name], vocab_size=512 if quick else VOCABULARY, use_cache=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = MambaForCausalLM(config).to(device, dtype).train()
    documents = draw_documents(count, config.vocab_size, device, scale=0.05 if quick else 1)
    tokens = sum(len(each) for each in documents)
    ways = steps_of(torch.compile(model, backend=packc.backend), documents)
    print(f"\n{name}: {count} documents, {tokens} tokens, {dtype}, on {where(device)}")

    losses, seconds = {}, {}
    for way, step in ways.items():
        for _ in range(2):  # what is compiled for the first shape, and for sizes that vary
            losses[way] = step().item()
            model.zero_grad()
        seconds[way] = [timed(step, model, device) for _ in track(range(steps), way, transient=True)]
    rows = []
    for way, times in seconds.items():
        speed, single = tokens / median(times), tokens / median(seconds["single"])
        rows.append(
            {
                "device": where(device),
                "model": name,
                "way": way,
                "tokens": tokens,
                "median_step_seconds": round(median(times), 6),
                "tokens_per_second": round(speed, 1),
                "times_single": round(speed / single, 3),
                "loss": losses[way],
            }
        )
        print(f"  {way:8} {speed:12,.0f} tokens/s  {speed / single:6.2f}x single   loss {losses[way]:.5f}")
    return rows


def draw_documents(count: int, vocabulary: int, device: torch.device, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(count).log_normal_(0, 0.85, generator=generator)
    lengths = (lengths * MEAN / lengths.mean()).clamp(SHORTEST, LONGEST) * scale
    return [torch.randint(1, vocabulary, (max(int(n), 2),), generator=generator).to(device) for n in lengths]


def steps_of(model: Callable, documents: list[Tensor]) -> dict[str, Step]:
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in documents], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    predicted = sum(len(each) - 1 for each in documents)

    def single() -> Tensor:
        total = torch.zeros((), device=ids.device)
        for each in documents:
            loss = model(input_ids=each[None], labels=each[None]).loss * ((len(each) - 1) / predicted)
            loss.backward()
            total += loss.detach()
        return total

    def padded() -> Tensor:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach()

    def packed() -> Tensor:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.detach()

    return {"single": single, "padded": padded, "packed": packed}


def timed(step: Step, model: torch.nn.Module, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    model.zero_grad()
    synchronize()
    begin = perf_counter()
    step()
    synchronize()
    return perf_counter() - begin


def where(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"


def draw(rows: list[dict[str, object]], file: Path) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4 * len(models), 3.5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False).flat, models, strict=True):
        shown = [row for row in rows if row["model"] == model]
        bars = axes.bar([row["way"] for row in shown], [row["tokens_per_second"] for row in shown])
        axes.bar_label(bars, [f"{row['times_single']:.2f}x" for row in shown])
        axes.set(title=f"Mamba {model}", ylabel="real tokens / s")
    figure.suptitle(str(rows[0]["device"]))
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
