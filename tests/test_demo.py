"""The demo: its data is what it claims, stock contenders never see packc, and a wrong loss curve is told."""

import io
from itertools import islice

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")

from transformers import MambaConfig, MambaForCausalLM

from packc.cli import main
from packc.demo import command
from packc.demo.contender import Contender, Job, Step, TimeLimit
from packc.demo.data import documents, padded_batches, train_tokenizer
from packc.demo.plot import draw
from packc.demo.result import Result
from packc.demo.table import show

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16, "state_size": 2, "use_cache": False}


@pytest.fixture(scope="module")
def batches():
    texts = list(islice(documents(), 300))
    tokenizer = train_tokenizer(texts, vocab_size=300)
    return list(padded_batches(texts, tokenizer, batch_size=4, max_length=200))


@pytest.fixture
def job():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    tokens = torch.arange(8).reshape(2, 4) * mask
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    return Job(TINY, MambaForCausalLM(MambaConfig(**TINY)).state_dict(), [batch], learning_rate=1e-3)


def test_rows_are_padded_to_the_longest_of_their_batch(batches):
    for batch in batches:
        mask = batch["attention_mask"]
        assert mask.all(1).any()
        assert torch.equal(batch["labels"] == -100, mask == 0)


def test_batches_differ_in_length_and_padding(batches):
    assert len({batch["input_ids"].shape[1] for batch in batches}) > len(batches) // 4
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert 0.3 < 1 - real / sum(batch["attention_mask"].numel() for batch in batches) < 0.8


def test_documents_come_in_an_order_of_their_own_for_every_seed():
    first, again, other = (list(islice(documents(seed=seed), 5)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_stock_contender_trains_without_packc_and_starts_again(job):
    with Contender(job, "eager") as contender:
        losses = [contender.step(0).loss for _ in range(2)]
        contender.restart()
        assert contender.step(0).loss == losses[0] != losses[1]


def test_a_contender_that_fails_says_why(job):
    with pytest.raises(RuntimeError, match="Invalid backend: 'no_such_backend'"):
        Contender(job, "no_such_backend")


def test_a_contender_that_takes_too_long_is_ended(job):
    with pytest.raises(TimeLimit, match="eager: did not finish in 0 s"):
        Contender(job, "eager", time_limit=0.01)


def results(stock_loss):
    packc = [Step(0.1, 2.0, 500, 1), Step(0.1, 1.0, 500, 1)]
    eager = [Step(10, 2.0, 700, 0), Step(10, stock_loss, 700, 0)]
    return Result("packc", packc, packc[0], packc, [2.0, 1.0]), [Result("stock eager", eager[:1], curve=eager)]


@pytest.mark.parametrize(("stock_loss", "same"), [(1.00001, True), (1.001, False), (float("nan"), False)])
def test_the_table_tells_whether_loss_curves_agree(batches, stock_loss, same):
    printed = io.StringIO()
    assert show(*results(stock_loss), batches[:2], Console(file=printed, width=120)) is same
    assert ("NOT equal" in printed.getvalue()) is not same
    assert "100.0" in printed.getvalue()  # times packc's step


def test_the_plot_is_a_picture(tmp_path):
    draw(*results(1.0), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "_EXTRAS", ("rich", "no_such_library"))
    assert main(["demo"]) == 2
    assert 'needs no_such_library: pip install "packc[examples]"' in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "demo" in capsys.readouterr().out


def test_the_whole_demo_in_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PACKC_INNER", "aot_eager")  # read by the contenders' processes
    small = ["--steps=6", "--eager-steps=2", "--batch-size=3", "--max-length=48", "--hidden-size=16", "--layers=1"]
    # Stock Inductor alone takes minutes.
    assert main(["demo", *small, "--skip=inductor", f"--output={tmp_path}/demo.png"]) == 0
    assert "1e-04: equal" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "demo.png").exists()
