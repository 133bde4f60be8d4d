"""The document of every token, as kernels are told."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packc.ops import documents
from packc.ops.tritonsrc.documents import document_of_token


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 5) | st.integers(200, 300), min_size=1, max_size=9), wide=st.booleans())
def test_tokens_are_told_their_document(lengths, wide):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    expected = documents.of_token(starts, sum(lengths))
    assert document_of_token(starts if wide else starts.int(), sum(lengths)).equal(expected.int())
