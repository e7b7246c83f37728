"""The perceptron of `_replicas` in torch: replica after replica, and all by torch.func.vmap."""

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RATE, DECAY = 1e-3, 1e-4  # of optax.adamw, as `_replicas` has it


def calls(sizes: Sequence[int], batches: Any, replicas: int) -> dict[str, Callable[[], Any]]:
    """Calls that train `replicas` through all of `batches` once, by name."""
    import torch  # pyright: ignore[reportMissingImports]

    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.tensor(np.asarray(a), device=device) for a in batches)
    y = y.long()

    def network():
        layers = []
        for a, b in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1]).to(device)

    nets = [network() for _ in range(replicas)]
    rules = [torch.optim.AdamW(n.parameters(), lr=RATE, weight_decay=DECAY) for n in nets]

    def eager():
        for net, rule in zip(nets, rules, strict=True):
            for inputs, labels in zip(x, y, strict=True):
                rule.zero_grad(set_to_none=True)
                torch.nn.functional.cross_entropy(net(inputs), labels).backward()
                rule.step()
        return _settled(torch, device)

    params, _ = torch.func.stack_module_state(nets)
    params = {name: value.detach().clone() for name, value in params.items()}
    first = {name: torch.zeros_like(value) for name, value in params.items()}
    second = {name: torch.zeros_like(value) for name, value in params.items()}
    count = [0]
    shape = network()

    def loss(params, inputs, labels):
        logits = torch.func.functional_call(shape, params, (inputs,))
        return torch.nn.functional.cross_entropy(logits, labels)

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))

    def vmapped():
        for inputs, labels in zip(x, y, strict=True):
            count[0] += 1
            grads = gradient(params, inputs, labels)
            with torch.no_grad():
                _adamw(torch, params, first, second, grads, count[0])
        return _settled(torch, device)

    return {"torch eager": eager, "torch.func vmap": vmapped}


def _adamw(torch, params, first, second, grads, t: int) -> None:
    """All tensors at once, in place."""
    names = list(params)
    p, m, v, g = ([tree[n] for n in names] for tree in (params, first, second, grads))
    torch._foreach_mul_(p, 1 - RATE * DECAY)
    torch._foreach_lerp_(m, g, 0.1)
    torch._foreach_mul_(v, 0.999)
    torch._foreach_addcmul_(v, g, g, 0.001)
    scale = torch._foreach_sqrt(v)
    torch._foreach_div_(scale, (1 - 0.999**t) ** 0.5)
    torch._foreach_add_(scale, 1e-8)
    torch._foreach_addcdiv_(p, m, scale, -RATE / (1 - 0.9**t))


def _settled(torch, device: str):
    if device == "cuda":
        torch.cuda.synchronize()
    return ()
