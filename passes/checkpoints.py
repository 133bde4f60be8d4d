"""Activation checkpoints of a Dynamo graph, inlined: their bodies' nodes are tagged as the partitioner wants them.

A checkpoint is a higher-order op in Dynamo's graph and two tags a node after AOTAutograd has traced it; only the second
form is one graph, which passes can follow.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, SelectiveCheckpointContext

from packc.passes.autocast_regions import UnderAutocast
from packc.passes.reasons import NotPackable
from packc.private_torch import private_torch

with private_torch():
    from torch._higher_order_ops.wrap import tag_activation_checkpoint
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import _CachingTorchDispatchMode

# What a node is of which one op must be saved and another need not.
_STRONGEST_FIRST = (
    CheckpointPolicy.MUST_SAVE,
    CheckpointPolicy.PREFER_SAVE,
    CheckpointPolicy.MUST_RECOMPUTE,
    CheckpointPolicy.PREFER_RECOMPUTE,
)


class InlineCheckpoints(UnderAutocast):
    """Runs the body of a checkpoint in place, its nodes tagged: to be recomputed, or as its policy says.

    Raises:
        NotPackable: a checkpoint chooses what to save in another way than by a policy.
    """

    def __init__(self, gm: fx.GraphModule, regions: Iterator[int] | None = None) -> None:
        super().__init__(gm)
        self.regions = itertools.count(1) if regions is None else regions

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not tag_activation_checkpoint:
            return super().call_function(target, args, kwargs)
        body, *operands = args
        region = next(self.regions)
        tagged = fx.GraphModule(body, copy.deepcopy(body.graph))
        for node in tagged.graph.nodes:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = region
        if "_checkpoint_context_fn" in body.meta:
            forward, _ = body.meta["_checkpoint_context_fn"]()
            if not isinstance(forward, _CachingTorchDispatchMode):
                raise NotPackable("a checkpoint that chooses what to save by contexts of its own is not followed")
            with disable_proxy_modes_tracing():
                _ByPolicy(tagged, forward.policy_fn).run(*operands)
        return InlineCheckpoints(tagged, self.regions).run(*operands)


class _ByPolicy(fx.Interpreter):
    """Tags nodes with what a policy says of the ops that they come to, which are those it is asked of in eager."""

    def __init__(self, gm: fx.GraphModule, policy: Any) -> None:
        super().__init__(gm)
        self.policy = policy

    def run_node(self, n: fx.Node) -> Any:
        with _Asking(self.policy) as asking:
            result = super().run_node(n)
        n.meta["recompute"] = _strongest(asking.said)
        return result


class _Asking(TorchDispatchMode):
    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy, self.said = policy, list[CheckpointPolicy | bool]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in SAC_IGNORED_OPS:
            context = SelectiveCheckpointContext(is_recompute=False)
            context.op_output = result  # an argument from torch 2.13 on
            self.said.append(self.policy(context, func, *args, **(kwargs or {})))
        return result


def _strongest(said: Iterable[CheckpointPolicy | bool]) -> CheckpointPolicy:
    said = {_POLICIES[each] if isinstance(each, bool) else each for each in said}
    return next((each for each in _STRONGEST_FIRST if each in said), CheckpointPolicy.PREFER_RECOMPUTE)


_POLICIES = {True: CheckpointPolicy.MUST_SAVE, False: CheckpointPolicy.PREFER_RECOMPUTE}
