"""What a module of experts does in its forward pass, with its weights in int8.

The arguments and the order of its steps are those of transformers' experts interface
(`transformers.integrations.moe`): sort the pairs of token and expert by expert, two linear layers with a gate or an
activation between them, routing weights, and the sum over the experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch

from pyint8.quantizer.experts.linear import experts_forward, experts_linear, sort_pairs, weighted_sum
from pyint8.quantizer.experts.names import SCALES

_SILU = ("SiLU", "SiLUActivation")  # of torch, and of transformers
# Of the function that transformers gives a class without a gate of its own.
_DEFAULT_GATE = "_default_apply_gate"


def int8_experts_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The output of a module of experts.

    Args:
        experts: The module; its weights are int8 [experts, out, in], with fp32 [experts, out] beside them.
        hidden_states: [tokens, hidden].
        top_k_index: The experts of each token, [tokens, k].
        top_k_weights: Their routing weights, [tokens, k].

    Returns:
        [tokens, hidden], of the dtype of `hidden_states`.
    """
    if is_usual(experts) and not experts.updates and not _has_gradients(hidden_states, top_k_weights):
        found: torch.Tensor = experts_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            experts.gate_up_proj,
            getattr(experts, "gate_up_proj" + SCALES),
            experts.down_proj,
            getattr(experts, "down_proj" + SCALES),
        )
        return found
    k = top_k_index.shape[1]
    ids = top_k_index.reshape(-1)
    order, places, ends = sort_pairs(ids, experts.num_experts)
    in_order = ids[order].clamp(max=experts.num_experts - 1)
    first = "gate_up_proj" if experts.kind.has_gate else "up_proj"
    inner = _linear(experts, first, hidden_states[order // k], ends, in_order)
    inner = experts._apply_gate(inner) if experts.kind.has_gate else experts.act_fn(inner)
    outer = _linear(experts, "down_proj", inner, ends, in_order)
    if _has_norm(experts):
        outer = experts.post_expert_norm(outer)
    may_be_elsewhere = getattr(experts, "_is_expert_parallel", True)  # those of other ranks; since transformers 5.20
    is_here = top_k_index < experts.num_experts if may_be_elsewhere else None
    return weighted_sum(outer, places, top_k_weights, is_here).to(hidden_states.dtype)


def sorted_experts_forward(experts: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The output of a module of experts that takes every token for every expert, weighted: Llama 4's.

    Rows of a weight of 0, which are nearly all, give 0; weights of experts that have no others are not even read.

    Args:
        experts: The module; its weights are int8 [experts, out, in], with fp32 [experts, out] beside them.
        hidden_states: [experts * tokens, hidden], expert by expert.

    Returns:
        [experts * tokens, hidden], of the dtype of `hidden_states`.
    """
    count = experts.num_experts
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = torch.arange(count, device=rows.device).repeat_interleave(len(rows) // count)
    if type(experts.act_fn).__name__ in _SILU:  # of 0, it is 0, and so is its product's gradient
        ids = torch.where((rows != 0).any(dim=-1), ids, count)
    order, places, ends = sort_pairs(ids, count)
    gate, up = _linear(experts, "gate_up_proj", rows[order], ends, ids).chunk(2, dim=-1)
    return _linear(experts, "down_proj", up * experts.act_fn(gate), ends, ids)[places]


def is_usual(experts: Any) -> bool:
    """Whether its gate is silu of the first half of its outputs, times the second, as transformers' own default is."""
    kind = experts.kind
    is_default = getattr(type(experts)._apply_gate, "__name__", "") == _DEFAULT_GATE if kind.has_gate else False
    is_plain = not kind.has_bias and not _has_norm(experts)
    return is_default and is_plain and type(experts.act_fn).__name__ in _SILU


def _has_norm(experts: Any) -> bool:
    """Whether a norm follows; before transformers 5.20 none did."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def _has_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _linear(experts: Any, name: str, x: torch.Tensor, ends: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = experts_linear(x, getattr(experts, name), getattr(experts, name + SCALES), ends)
    for update in experts.updates.get(name, ()):
        y = y + update.of(x, ids, len(ends)).to(y.dtype)
    return y + getattr(experts, f"{name}_bias")[ids] if experts.kind.has_bias else y
