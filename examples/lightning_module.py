"""A Lightning module packed by one line, in ``configure_model``: ``python examples/lightning_module.py``.

Needs ``pip install -e ".[trainers]"``.
"""

import argparse
import tempfile
from itertools import islice

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import MambaConfig, MambaForCausalLM

from packc.demo.data import documents, padded_batches, train_tokenizer  # your data here


class LanguageModel(lightning.LightningModule):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:  # Lightning calls this before each of fit, validate and predict
            self.model = MambaForCausalLM(self.config)
            self.model.compile(backend="packc")

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.model(**batch).loss)

    def predict_step(self, batch, _):
        return self.model(**batch).logits.argmax(-1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()

    tokenizer = train_tokenizer(list(islice(documents(), 1000)), vocab_size=512)
    shape = {"batch_size": options.batch_size, "max_length": options.max_length}
    batches = list(islice(padded_batches(documents(), tokenizer, **shape), options.steps + 2))
    held_out = DataLoader(batches[-2:], batch_size=None)
    batches = DataLoader(batches[:-2], batch_size=None)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        use_cache=False,
    )

    with tempfile.TemporaryDirectory() as folder:
        how = {"default_root_dir": folder, "logger": False, "accelerator": "auto", "devices": 1}
        trainer = lightning.Trainer(**how, max_steps=options.steps // 2)
        trainer.fit(LanguageModel(config), batches, held_out)
        saved = trainer.checkpoint_callback.best_model_path
        resumed = lightning.Trainer(**how, max_steps=options.steps, enable_checkpointing=False)
        module = LanguageModel(config)
        resumed.fit(module, batches, held_out, ckpt_path=saved)
        print(resumed.validate(module, held_out))
        print(resumed.predict(module, held_out)[0].shape)


if __name__ == "__main__":
    main()
