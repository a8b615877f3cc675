"""FSDP2: weights, gradients and optimiser state cut into as many pieces as there are devices, from outside the model.

`shard` cuts a GPT. A block's weights are gathered when it runs and dropped afterwards, so that a device holds its share and one
block; or, where memory allows, they and their gradients stay whole over the batches of a step (`end_step_with`), and only the
optimiser's state is always in pieces. The other functions go between the pieces and whole tensors, under the names and numbers that
a run on one device has: a checkpoint is the same file whatever wrote it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from flash_ladder.model.gpt import GPT

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(net: GPT, mesh: DeviceMesh, *, whole_in_step: bool = False, compiled: bool = False) -> None:
    """Cuts `net` over the devices of `mesh` (1-D), in place: every block is gathered by itself, and what is left as one.

    The pieces are float32 and are gathered as float32: autocast then rounds a matrix where it is used, as it does on one device.
    Gathering bf16 (MixedPrecisionPolicy) would halve the traffic, but FSDP2 rounds all of a block's weights or none, and norms
    and the embedding, where the residual stream starts, would be bf16. Gradients are averaged in float32 as well, so that a step
    is one device's to rounding. What is left, the embedding (also the head, where they are tied) and the last norm, is needed
    first and last, and stays gathered from the forward to the backward pass.

    whole_in_step: keep gathered weights until `end_step_with` says otherwise.
    compiled: compile every block, and the head with the loss. Gathering goes on around them: a graph of the whole network would
    break at every block.
    """
    for block in net.blocks:
        if compiled:
            block.forward = torch.compile(block.forward, fullgraph=True)
        fully_shard(block, mesh=mesh, reshard_after_forward=not whole_in_step)
    if compiled:
        net.predict = torch.compile(net.predict, fullgraph=True)  # type: ignore[method-assign]
    fully_shard(net, mesh=mesh)


def end_step_with(net: GPT, batch_is_last: bool) -> None:
    """Says of a cut `net`'s next batch whether a step ends with it, so that gradients are shared out and gathered weights dropped.

    The batches before it add their gradients up whole: a step gathers and reduces once, whatever the number of its batches, for
    8 bytes a parameter on every device.
    """
    cut = cast("FSDPModule", net)
    cut.set_requires_gradient_sync(batch_is_last)
    cut.set_reshard_after_backward(batch_is_last)


def is_sharded(net: nn.Module) -> bool:
    """Whether `shard` has cut `net`."""
    return isinstance(net, FSDPModule)


def whole(net: GPT) -> GPT:
    """`net` in one piece on the CPU, on the first process; `net` itself where it is not cut, and on the other processes.

    All processes must call it.
    """
    if not is_sharded(net):
        return net
    weights = get_model_state_dict(net, options=WHOLE)  # empty but on the first process
    if torch.distributed.get_rank():
        return net
    with torch.device("meta"):
        copy = GPT(net.cfg, backend=net.backend)
    copy.load_state_dict(weights, assign=True)
    return copy


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives every device its piece of `weights`, which all processes hold."""
    set_model_state_dict(module, dict(weights), options=StateDictOptions(full_state_dict=True))


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state in one piece, as `optimizer.state_dict` gives it on one device; empty but on the first process."""
    state: Any = get_optimizer_state_dict(module, optimizer, options=WHOLE)
    if not state:
        return state
    number = {name: i for i, name in enumerate(_names(module, optimizer))}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]],
    }


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives every device its piece of `state`, which is as `optimizer.state_dict` gives it on one device."""
    names = _names(module, optimizer)
    named: Any = {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]],
    }
    set_optimizer_state_dict(module, optimizer, named, options=StateDictOptions(full_state_dict=True))


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The name of every parameter in the order in which the optimiser numbers them: group after group."""
    name = {parameter: name for name, parameter in module.named_parameters()}
    return [name[parameter] for group in optimizer.param_groups for parameter in group["params"]]
