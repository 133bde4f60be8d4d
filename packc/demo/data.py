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
    from collections.abc import Iterator

    from torch import Tensor

_PAD, _END = "<pad>", "<end>"


def documents(count: int, *, seed: int = 0) -> list[str]:
    """Sources of functions, and docstrings, of the standard library: ``count`` of them in random order."""
    pick = random.Random(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    pick.shuffle(files)
    found: list[str] = []
    for file in files:
        found.extend(_documents_of(file.read_text(encoding="utf-8", errors="replace")))
        if len(found) >= 2 * count:  # of several files, not of the first ones alone
            break
    pick.shuffle(found)
    return found[:count]


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
    texts: list[str], tokenizer: PreTrainedTokenizerFast, *, batch_size: int, max_length: int
) -> list[dict[str, Tensor]]:
    """Rows of text cut at ``max_length`` tokens and padded to the longest of their batch, labels -100 on padding."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    ended = [text + tokenizer.eos_token for text in texts]
    rows = [tokenizer(text, truncation=True, max_length=max_length, return_token_type_ids=False) for text in ended]
    last = len(rows) - batch_size
    return [dict(collate(rows[first : first + batch_size])) for first in range(0, last + 1, batch_size)]
