"""Which loss a model of transformers has, where its class's name does not say (``GPT2LMHeadModel``)."""

from typing import Any

from packc.frontends.keep_whole import KeptWhole, Method


def loss_function(self: Any) -> Any:
    """The original warns that it takes the default, and Dynamo breaks the graph between the model and its loss there,
    at every call: the loss would read what the model computed as padded logits."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    if hasattr(self, "_loss_function") or getattr(self, "loss_type", None) in LOSS_MAPPING:
        return NotImplemented
    return LOSS_MAPPING["ForCausalLM"]


KEPT_WHOLE: KeptWhole = {"transformers.modeling_utils": {"PreTrainedModel": Method("loss_function", loss_function)}}
