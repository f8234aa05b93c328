"""Where DeepSpeed's ZeRO keeps the masters and moments of a parameter: its fragments, seen from one process.

ZeRO 1 and 2 lay a group's parameters end to end and give each process one stretch, whose ends fall anywhere. ZeRO 3
gives each process an equal share of every parameter, the last one padded. Both keep fp32 masters and AdamW's
moments as flat tensors over many parameters; what a parameter has of them is a slice. ZeRO++'s second copy of the
weights in each node (hpZ) holds nothing of its own: it is dropped when the first one changes.
"""

from collections.abc import Iterator

import torch
from torch import nn

from engine.backends.guard import Guard
from engine.backends.tensors import Fragment, State
from engine.backends.torch_optimizer import MOMENTS, counters, moments_of, share_counters
from engine.errors import ConfigError


def zero_state(
    stored: Iterator[tuple[str, nn.Parameter]],
    shapes: dict[str, torch.Size],
    zero,
    optimizer: torch.optim.AdamW,
    guard: Guard,
) -> State:
    """Fragments of weights and moments, as views of DeepSpeed's memory.

    Args:
        shapes: full shape of every parameter; ZeRO 3 empties them.
        zero: DeepSpeed's optimizer around `optimizer`.
    """
    state = {}
    for flat in _flat_masters(zero):
        moments_of(flat, optimizer)
    for name, parameter in stored:
        numel = shapes[name].numel()
        if not parameter.requires_grad:
            state[f"model.{name}"] = weight_of(parameter, numel)
            continue
        place = _place_stage3(parameter, zero) if hasattr(parameter, "ds_id") else _place(parameter, zero)
        if place is None:
            state |= {f"{key}.{name}": Fragment(torch.empty(0), 0, numel) for key in ("model", *MOMENTS)}
            continue
        flat, offset, start, length = place
        moments = moments_of(flat, optimizer)
        for key, whole in [("model", flat.detach()), *((key, moments[key]) for key in MOMENTS)]:
            state[f"{key}.{name}"] = Fragment(whole.narrow(0, offset, length), start, numel)
    return state | counters(optimizer, guard)


def _flat_masters(zero) -> list[torch.Tensor]:
    """This process's fp32 masters, one flat tensor a group, whatever ZeRO's implementation calls them."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return getattr(zero, name)
    raise ConfigError(
        f"ds_config: DeepSpeed's {type(zero).__name__} keeps its master weights where no checkpoint can take them from "
        "→ ZeRO stage 1, 2 or 3 without what this file adds."
    )


Place = tuple[torch.Tensor, int, int, int]
"""A flat tensor, the offset in it, the first element of the parameter that stands there, and how many do."""


def _place(parameter: nn.Parameter, zero) -> Place | None:
    """ZeRO 1 and 2: what of the parameter falls into this process's stretch; None if nothing does."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = _flat_masters(zero)[mapping.param_group_index]
    return flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel


def _place_stage3(parameter: nn.Parameter, zero) -> Place:
    group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
    start, length = _share(parameter, share)
    return _flat_masters(zero)[group], offset, start, length


def _share(parameter: nn.Parameter, share: int) -> tuple[int, int]:
    """Start and length of this process's share of a ZeRO 3 parameter, without the padding."""
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    start = min(rank * share, parameter.ds_numel)
    return start, min(share, parameter.ds_numel - start)


def weight_of(parameter: nn.Parameter, numel: int) -> Fragment:
    """The weight itself (what is not trained has no master): ZeRO 3 shares it, the others hold all of it everywhere.

    Args:
        numel: of the full weight; ZeRO 3 empties it.
    """
    if not hasattr(parameter, "ds_id"):
        return Fragment.whole(parameter)
    start, length = _share(parameter, parameter.ds_tensor.numel())
    return Fragment(parameter.ds_tensor.detach().view(-1).narrow(0, 0, length), start, numel)


@torch.no_grad()
def zero_restored(zero, optimizer: torch.optim.AdamW, guard: Guard) -> None:
    """After new masters and moments: the weights that the forward uses are made from them."""
    share_counters(optimizer, guard)
    if not hasattr(zero, "fp16_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    for masters, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
        weights.copy_(masters)
    persistent = zero.persistent_parameters  # small ones that every process keeps whole: gathered anew
    if persistent:
        persistent[0].partition(persistent)
    # ZeRO++ gathers from a node's second copy while there is one; all of these hold the weights of before
    zero.invalidate_secondary_tensor()
    if persistent:
        persistent[0].all_gather(persistent)
