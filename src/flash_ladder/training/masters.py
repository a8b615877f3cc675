"""A network that computes in bf16 throughout, beside float32 master weights that the optimiser updates.

Under autocast, weights and the residual stream are float32, and every forward pass casts what the matrix products need. Here
weights, residual stream and gradients of one batch are bf16, which moves half of the bytes. What must not be rounded stays in
float32: the weights that the optimiser changes by less than bf16 can tell, the gradients that add up over a step's batches, and
the optimiser's state (Micikevicius et al., 2018: https://arxiv.org/abs/1710.03740, section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MasterWeights:
    """Float32 copies of the weights of `net`, which it turns to bf16.

    `net.state_dict()` holds the masters, so that a checkpoint is that of any other run, and `net.load_state_dict` sets both.
    """

    def __init__(self, net: nn.Module) -> None:
        self.weights = dict(net.named_parameters())
        self.masters = {name: nn.Parameter(weight.detach().float()) for name, weight in self.weights.items()}
        for weight in self.weights.values():
            weight.data = weight.data.bfloat16()
        net.register_state_dict_post_hook(lambda *given: self._give(*given))  # PyTorch marks the function
        net.register_load_state_dict_pre_hook(self._take)

    def to(self, device: torch.device) -> None:
        """Moves the masters to the device of their weights."""
        for master in self.masters.values():
            master.data = master.data.to(device)

    def add_gradients(self) -> None:
        """Adds a batch's gradients to the masters' in float32, and takes them off the network. Call it after every backward."""
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            master, gradient = self.masters[name], weight.grad
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    @torch.no_grad()
    def publish(self, *_: Any) -> None:
        """Rounds the masters to the network's weights. Call it after every step of the optimiser."""
        torch._foreach_copy_(list(self.weights.values()), list(self.masters.values()))

    def _give(self, net: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
        state.update({prefix + name: master.detach() for name, master in self.masters.items()})

    @torch.no_grad()
    def _take(self, net: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name, master in self.masters.items():
            if prefix + name in state and state[prefix + name].shape == master.shape:  # load_state_dict itself refuses another
                master.copy_(state[prefix + name])
