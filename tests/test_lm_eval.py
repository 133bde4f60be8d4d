"""lm_eval's Hugging Face backend gives the numbers of stock. It scores without a mask, and generates with one."""

import copy
import json
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

import packc
from packc.demo.data import documents, train_tokenizer

sys.path.insert(0, str(Path(__file__).parent / "frontends"))
from tiny_models import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts():
    return list(islice(documents(), 24))


def of_local_text(texts, folder):
    """A task: which of two lines goes on the text."""
    file = folder / "questions.jsonl"
    lines = [text.split("\n") for text in texts if text.count("\n") > 2][:8]
    questions = [{"text": first + "\n", "choices": [second, third]} for first, second, third, *_ in lines]
    file.write_text("".join(json.dumps(each) + "\n" for each in questions))
    return {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }


def test_scores_and_generations_are_those_of_stock(texts, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = train_tokenizer(texts, vocab_size=300)
    stock = tiny_model("mamba")
    stock.resize_token_embeddings(len(tokenizer))
    model = copy.deepcopy(stock)
    model.compile(backend="packc", options={"packc.inner": "aot_eager"})
    found = []
    for each in (stock, model):
        before = packc.stats()
        lm = HFLM(pretrained=each, tokenizer=tokenizer, batch_size=4, max_length=256, device="cpu")
        scored = lm_eval.simple_evaluate(
            lm, tasks=[of_local_text(texts, tmp_path)], bootstrap_iters=0, log_samples=True
        )
        prompts = [
            Instance("generate_until", {}, (text[:60], {"until": ["\n\n"], "max_gen_toks": 4}), number)
            for number, text in enumerate(texts[:6])
        ]
        generated = lm.generate_until(prompts, disable_tqdm=True)
        packed = packc.stats()["steps"] - before["steps"]
        scores = [sample["filtered_resps"] for sample in scored["samples"]["local_text"]]
        found.append((scores, generated, packed))
    (wanted, texts_of_stock, none), (got, texts_of_packc, steps) = found
    assert texts_of_packc == texts_of_stock
    assert (none, steps > 0) == (0, True)
    numbers = [torch.tensor([[float(score) for score, _ in each] for each in of]) for of in (got, wanted)]
    torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-4)
