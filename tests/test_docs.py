"""What README and docs show runs: blocks of Python, what they print, and commands with the options they take."""

import contextlib
import copy
import dataclasses
import doctest
import io
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import (
    PlainLM,
    RecordingBackend,
    assert_same_step,
    batch_of,
    exact_step,
    masks,
    tiny_mamba,
    train_step,
)
from messages import REPOSITORY
from torch.nn import functional as F

import packc
from packc import cli
from packc.data import __main__ as measuring

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- setup: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
NO_PYTHON = {"mermaid"}
ROWS = ["11111111", "11111000", "11000000"]


class Model(PlainLM):
    """Called as models of transformers are."""

    def forward(self, input_ids, labels, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        loss, logits = super().forward(input_ids, mask, labels)
        return SimpleNamespace(loss=loss, logits=logits)


# ---- setups: what a block finds, and behind their yield what it must have done ---------------------------------------


def padded_batch(names, patch):
    model, batch = Model(layers=1), batch_of(ROWS)
    names.update(torch=torch, model=model)
    names.update(ids=batch["input_ids"], mask=batch["attention_mask"], labels=batch["labels"])
    before = packc.stats()
    yield
    assert packc.stats()["tokens"] - before["tokens"] == 15
    assert all(parameter.grad is not None for parameter in model.parameters())


def documents_to_pack(names, patch):
    lengths = [3000, 5000, 100, 8192, 4000]
    documents = [{"input_ids": [1] * length} for length in lengths]
    names.update(lengths=lengths, documents=documents, DataLoader=torch.utils.data.DataLoader)
    yield
    tokens = [int(batch["attention_mask"].sum()) for batch in names["loader"]]
    assert sum(tokens) == sum(lengths)
    assert max(tokens) == 8192


def rows_of_documents(names, patch):
    ids = batch_of(ROWS)["input_ids"]
    labels = ids.clone()
    labels[:, [0, 5]] = -100
    names.update(model=torch.compile(Model(layers=1), backend="packc"), ids=ids, labels=labels)
    names.update(cu_seqlens=torch.tensor([0, 5, 8, 13, 16, 21, 24]))
    yield
    assert names["loss"].isfinite()


def training_loop(names, patch):
    model, written = torch.compile(Model(layers=1), backend="packc"), {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: written.setdefault(step, {}).update({name: value}))
    names.update(model=model, loader=[batch_of(ROWS)] * 20, writer=writer)
    names.update(train_step=lambda model, batch: model(**batch).loss.backward())
    yield
    assert written.keys() == {9, 19}
    assert written[19]["packc/tokens"] == 150
    assert written[19]["packc/left_out"] == pytest.approx(1 - 15 / 24)
    assert written[19]["packc/whole_rows"] == 0


def weighed_loss(names, patch):
    class Weighed(Model):
        def forward(self, input_ids, labels, attention_mask, num_items_in_batch):
            mean = super().forward(input_ids, labels, attention_mask).loss
            return SimpleNamespace(loss=mean * (labels[:, 1:] != -100).sum() / num_items_in_batch)

    model, batch = Weighed(layers=1), batch_of(ROWS)
    names.update(model=model, batch=batch)
    yield
    expected = model(**batch, num_items_in_batch=torch.tensor(12)).loss
    torch.testing.assert_close(names["loss"], expected)
    assert all(parameter.grad is not None for parameter in model.parameters())


def selective_checkpoints(names, patch):
    names.update(torch=torch, model=tiny_mamba(layers=1))
    yield
    names["model"].compile(backend="packc")
    batch = batch_of(ROWS)
    step = train_step(names["model"], batch)
    names["model"].gradient_checkpointing_disable()
    assert_same_step(step, exact_step(names["model"], batch), batch["attention_mask"])


def lm_eval(names, patch):
    class HFLM:
        """Calls its model as lm_eval's does: rows padded with zeros, no mask, logits taken by length."""

        def __init__(self, model):
            self.model = model

        def _model_call(self, inps, attn_mask=None, labels=None):
            with torch.no_grad():
                return self.model(inps).logits

        def _loglikelihood_tokens(self, requests):
            rows = [torch.tensor((context + continuation)[:-1]) for _, context, continuation in requests]
            logits = self._model_call(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
            return torch.cat([each[: len(row)] for each, row in zip(logits, rows, strict=True)])

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        patch.setitem(sys.modules, name, SimpleNamespace(HFLM=HFLM))
    names.update(torch=torch)
    yield
    stock = tiny_mamba(layers=1)
    model = copy.deepcopy(stock)
    model.compile(backend="packc", options={"packc.strict": False})
    scored, plain = names["Masked"](model), HFLM(stock)
    long, short, ends_in_zero = ([3, 0, 4, 5, 0, 6], [7]), ([0, 2, 1], [5, 4]), ([1, 2, 0], [9])
    for rows, packed in (([long, short], 10), ([long, short, ends_in_zero], 0), ([long, short], 10)):
        requests, before = [(("", ""), *row) for row in rows], packc.stats()["tokens"]
        got, wanted = (each._loglikelihood_tokens(requests) for each in (scored, plain))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
        assert packc.stats()["tokens"] - before == packed


def one_rank(names, patch):
    T, D, N = 12, 4, 2
    given = {"ids": torch.randint(8, (1, T)), "labels": torch.randint(8, (1, T)), "logits": torch.randn(1, T, 8)}
    given |= {"u": torch.randn(1, T, D), "delta": torch.rand(1, T, D), "A": -torch.rand(D, N)}
    given |= {"B": torch.randn(1, T, N), "C": torch.randn(1, T, N), "cu_seqlens": torch.tensor([0, 5, T])}
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names.update(given, packc=packc, mesh={"sequence": dist.group.WORLD})
    try:
        yield
    finally:
        dist.destroy_process_group()
    whole = packc.ops.selective_scan(
        *(given[name] for name in ("u", "delta", "A", "B", "C")), cu_seqlens=given["cu_seqlens"]
    )
    torch.testing.assert_close(names["h"], whole)
    assert names["x"].equal(given["ids"])
    inside = [t for t in range(T) if t not in (4, T - 1)]  # the last token of a document predicts none
    following = given["labels"][0, [t + 1 for t in inside]]
    torch.testing.assert_close(names["loss"], F.cross_entropy(given["logits"][0, inside], following))


def model_on_one_rank(names, patch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names.update(mesh={"sequence": dist.group.WORLD})
    try:
        yield from padded_batch(names, patch)
    finally:
        dist.destroy_process_group()


def rule(names, patch):
    from packc.passes.reading import NotTokenwise, Reading
    from packc.passes.rules.registry import RULES, Op, register_rule

    aten = torch.ops.aten
    patch.delitem(RULES, aten.cumsum.default)
    names.update(aten=aten, register_rule=register_rule, Op=Op, Reading=Reading, NotTokenwise=NotTokenwise)
    yield

    def packed(dim):
        def model(x, mask):
            return packc.ops.causal_conv1d(x * mask[..., None], torch.ones(4, 2)).cumsum(dim)

        backend = RecordingBackend("eager")
        with packc.config.patch(strict=False):
            torch.compile(model, backend=backend)(torch.randn(3, 8, 4), masks(ROWS))
        return not backend.reasons

    assert packed(2)
    assert not packed(1)


def mixer(names, patch):
    from packc.ops.mixer import MIXERS, Example, Mixer
    from packc.ops.registration import declare

    names.update(torch=torch, declare=declare, Mixer=Mixer, Example=Example, CHUNK=64)
    yield
    patch.delitem(MIXERS, "decayed_sum")
    assert "Tensor x, Tensor g, Tensor? bias, float scale" in str(torch.ops.packc.decayed_sum.default._schema)


def summary(names, patch):
    from packc.ops.summary import Summary, add

    names.update(Summary=Summary, add=add)
    yield
    declared = dataclasses.replace(names["MIXER"], summary=names["summary"])
    assert list(declared.summary_arguments) == ["x", "g", "begin"]
    assert list(declared.adjoint_arguments) == ["dout", "g", "end"]


SETUPS = {
    "padded batch": padded_batch,
    "documents to pack": documents_to_pack,
    "rows of documents": rows_of_documents,
    "training loop": training_loop,
    "weighed loss": weighed_loss,
    "selective checkpoints": selective_checkpoints,
    "lm_eval": lm_eval,
    "one rank": one_rank,
    "a model on one rank": model_on_one_rank,
    "rule": rule,
    "mixer": mixer,
    "summary": summary,
}


@pytest.mark.parametrize(
    "file", [file for file in FILES if "```python" in file.read_text()], ids=lambda file: file.name
)
def test_blocks_of_python_run(file, monkeypatch):
    """One after the other in one namespace, each behind its setup, where a comment names one."""
    names = {}
    with packc.config.patch(inner="aot_eager", kernels="reference", strict=True):
        for setup, language, code in BLOCK.findall(file.read_text()):
            if language not in NO_PYTHON:
                assert language == "python", f"{file.name}: a block of {language or 'nothing'}"
                around = SETUPS[setup](names, monkeypatch) if setup else iter([None])
                next(around)
                exec(compile(code, file.name, "exec"), names)
                assert next(around, None) is None


def test_what_explain_prints():
    batch = {"attention_mask": (torch.arange(140) < torch.tensor([140] * 2 + [40] * 4 + [15] * 2)[:, None]).long()}
    batch["input_ids"] = torch.randint(1, 32, batch["attention_mask"].shape)
    text = (REPOSITORY / "README.md").read_text()
    example = doctest.DocTestParser().get_doctest(
        text, {"packc": packc, "model": tiny_mamba(), "batch": batch}, "README.md", None, None
    )
    said = io.StringIO()
    found = doctest.DocTestRunner().run(example, out=said.write)
    assert found.attempted == 1
    assert not found.failed, said.getvalue()


def test_readme_says_what_to_write_for_the_switch_of_trainer_that_cannot_work():
    assert "torch_compile_backend" in (REPOSITORY / "README.md").read_text()


def commands(pattern):
    """What follows ``pattern`` in commands of README and docs, as a shell would split it."""
    found = [each for file in FILES for each in re.findall(pattern + r"([^\n`&]*)", file.read_text())]
    assert found
    return [shlex.split(each) for each in found]


def test_commands_of_packc_exist():
    """And so do the options they are shown with."""
    mains = {"packc": cli.main, "packc.data": measuring.main}
    for module, *shown in commands("python -m (?=packc)"):
        help_text = io.StringIO()
        with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit) as left:
            mains[module]([*shown[: module == "packc"], "--help"])
        assert left.value.code == 0
        assert all(option in help_text.getvalue() for option in shown if option.startswith("--"))


def test_scripts_and_extras_exist():
    for name, *_ in commands("python (?=benchmarks/|examples/)"):
        assert (REPOSITORY / name).is_file(), name
    for file in FILES:
        for name in re.findall(r"(?:\.ci|benchmarks/gpu)/[\w.]+", file.read_text()):
            assert (REPOSITORY / name.rstrip(".")).is_file(), name
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, *_ in commands("pip install -e "):
        assert set(re.findall(r"[a-z]+", name)) <= set(extras), name


def test_links_lead_somewhere():
    """Of README and docs: paths in backticks and in links."""
    for file in FILES:
        for path in re.findall(r"`((?:docs|packc|passes|ops|tests|examples|benchmarks)/[\w/.]+)`", file.read_text()):
            assert (REPOSITORY / path).exists(), f"{file.name}: {path}"
        for path in re.findall(r"\]\((?!http|#)([^)#]+)", file.read_text()):
            assert (file.parent / path).exists(), f"{file.name}: {path}"
