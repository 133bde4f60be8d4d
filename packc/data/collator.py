"""From documents to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from packc.data.carried import CONTINUES

_IDS, _LABELS, _MASK = "input_ids", "labels", "attention_mask"
_IGNORED = -100


class PackingCollator:
    """A ``collate_fn`` and a Hugging Face data collator: examples of ids to a batch, of one of two forms.

    ``"padded"``: one document a row, ``(B, L)``, padded on the right, with ``attention_mask``. What packc packs by
    itself, so that padding costs no more than the memory of ids.

    ``"flat"``: documents end to end in one row, ``(1, T)``, without a mask: ``position_ids`` start again with each
    document, and the label of its first token is ignored, for no document predicts the next one's. The further inputs
    have the names that ``transformers.DataCollatorWithFlattening`` gives them.

    Args:
        form: ``"padded"`` or ``"flat"``.
        pad_token_id: the id at padding.
        max_length: at which documents are cut; None: never.
        seq_idx: flat, add ``seq_idx`` (1, T), int32: the number of each token's document.
        cu_seq_lens: flat, add ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (N + 1,), int32, and ``max_length_q`` and
            ``max_length_k``: where documents begin, and tokens of the longest.

    Examples with ``continues``, pieces of documents (:class:`Pieces`), give a ``continues`` ``(N,)``, int64. Positions
    are a piece's own, and the label of its first token is ignored: a cut costs one prediction.

    Called with a list of examples, each a mapping from ``input_ids`` and whatever else there is one of per token
    (``labels``, ``token_type_ids``, ...) to lists or tensors of integers; labels are the ids where there are none. An
    ``attention_mask`` of an example is left out, and must be of ones. Returns a dict of int64 tensors.

    Raises:
        ValueError: an example's parts have different lengths; its mask has a zero; or another ``form``.
    """

    def __init__(
        self,
        form: str = "padded",
        *,
        pad_token_id: int = 0,
        max_length: int | None = None,
        seq_idx: bool = False,
        cu_seq_lens: bool = False,
    ) -> None:
        if form not in ("padded", "flat"):
            raise ValueError(f"form must be 'padded' or 'flat', not {form!r}")
        if form == "padded" and (seq_idx or cu_seq_lens):
            raise ValueError("seq_idx and cu_seq_lens are of rows that are flat already")
        self.form, self.pad_token_id, self.max_length = form, pad_token_id, max_length
        self.seq_idx, self.cu_seq_lens = seq_idx, cu_seq_lens

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        parts = [{name: part for name, part in example.items() if name != CONTINUES} for example in examples]
        documents = [self._document(each) for each in parts]
        batch = self._padded(documents) if self.form == "padded" else self._flat(documents)
        if CONTINUES in examples[0]:
            batch[CONTINUES] = torch.tensor([example[CONTINUES] for example in examples])
        return batch

    def _document(self, example: dict[str, Any]) -> dict[str, Tensor]:
        parts = {name: torch.as_tensor(part, dtype=torch.int64)[: self.max_length] for name, part in example.items()}
        lengths = {name: len(part) for name, part in parts.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"an example's parts have one entry per token, not {lengths}")
        mask = parts.pop(_MASK, None)
        if mask is not None and not bool(mask.all()):
            raise ValueError("an example has padding (its attention_mask has a zero): pass it without")
        return {_LABELS: parts[_IDS], **parts}

    def _padded(self, documents: list[dict[str, Tensor]]) -> dict[str, Any]:
        values = {_IDS: self.pad_token_id, _LABELS: _IGNORED}
        batch = {
            name: pad_sequence([each[name] for each in documents], batch_first=True, padding_value=values.get(name, 0))
            for name in documents[0]
        }
        ones = [torch.ones_like(each[_IDS]) for each in documents]
        return {**batch, _MASK: pad_sequence(ones, batch_first=True)}

    def _flat(self, documents: list[dict[str, Tensor]]) -> dict[str, Any]:
        lengths = torch.tensor([len(each[_IDS]) for each in documents])
        batch: dict[str, Any] = {name: torch.cat([each[name] for each in documents])[None] for name in documents[0]}
        starts = lengths.cumsum(0) - lengths
        batch[_LABELS][0, starts[lengths > 0]] = _IGNORED
        places = torch.arange(int(lengths.sum()))
        batch["position_ids"] = (places - starts.repeat_interleave(lengths))[None]
        if self.seq_idx:
            batch["seq_idx"] = torch.arange(len(documents), dtype=torch.int32).repeat_interleave(lengths)[None]
        if self.cu_seq_lens:
            offsets = torch.cat([starts, lengths.sum()[None]]).to(torch.int32)
            batch |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
            batch |= dict.fromkeys(("max_length_q", "max_length_k"), int(lengths.max()))
        return batch
