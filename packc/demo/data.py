"""Text of really varying length that every machine has: functions and docstrings of Python's own library."""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

_PAD, _END = "<pad>", "<end>"
_ELSEWHERE = {"site-packages", "dist-packages", "test", "tests", "lib2to3"}
"""Folders that are not of the library, not in every installation, or not real text."""


def documents(*, seed: int = 0) -> Iterator[str]:
    """Sources of functions, and docstrings, of the standard library, a file after another in random order."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(library.rglob("*.py")) if not _ELSEWHERE & set(file.relative_to(library).parts)]
    random.Random(seed).shuffle(files)
    for file in files:
        yield from _documents_of(file.read_text(encoding="utf-8", errors="replace"))


def _documents_of(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in old docstrings
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield "".join(lines[node.lineno - 1 : node.end_lineno])
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_PAD, _END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=_PAD, eos_token=_END)


def padded_batches(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, *, batch_size: int, max_length: int
) -> Iterator[dict[str, Tensor]]:
    """Batches padded to their longest row, labels -100 on padding. Texts longer than ``max_length`` are left out."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = []
    for text in texts:
        row = tokenizer(text + tokenizer.eos_token, return_token_type_ids=False)
        if len(row["input_ids"]) <= max_length:
            rows.append(row)
        if len(rows) == batch_size:
            yield dict(collate(rows))
            rows = []
