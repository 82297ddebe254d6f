"""The state of models that are sharded over processes, and of their optimizers, as a whole."""
from typing import Any, Dict, List

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded, as ``fully_shard`` does."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def load_whole(copy: nn.Module, model: nn.Module) -> nn.Module:
    """Load the present weights and buffers of a sharded model into a copy that is not. Called by every process."""
    copy.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return copy


def full_model_state(model: nn.Module) -> Dict[str, Any]:
    """The ``state_dict`` of a model; of a sharded one whole, in host memory.

    Called by every process. Of a sharded model only the first process has it, the others get an empty one.
    """
    return get_model_state_dict(model, options=_WHOLE) if is_sharded(model) else model.state_dict()


def load_full_model_state(model: nn.Module, state: Dict[str, Any]) -> None:
    """Load what :func:`full_model_state` gave on the first process, on every process, into a model sharded or not."""
    if is_sharded(model):  # which replaces the entries of what it is handed
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def full_optimizer_state(model: nn.Module, optimizer: Any) -> Dict[str, Any]:
    """The ``state_dict`` of an optimizer; with a sharded model whole, in host memory, and of the same form.

    Called by every process. With a sharded model only the first process has it, the others get an empty one.

    Args:
        model: The model.
        optimizer: torch's optimizer, or Accelerate's around it.
    """
    if not is_sharded(model):
        return optimizer.state_dict()
    state: Any = get_optimizer_state_dict(model, _unwrapped(optimizer), options=_WHOLE)
    if not state:
        return {}
    numbers = {name: number for number, name in enumerate(_parameter_names(model, optimizer))}
    return {'state': {numbers[name]: values for name, values in state['state'].items()},
            'param_groups': [{**group, 'params': [numbers[name] for name in group['params']]}
                             for group in state['param_groups']]}


def load_full_optimizer_state(model: nn.Module, optimizer: Any, state: Dict[str, Any]) -> None:
    """Load what :func:`full_optimizer_state` gave on the first process, on every process, sharded or not.

    Raises:
        KeyError: It is of another optimizer, or of another model.
        ValueError: Likewise.
    """
    if not is_sharded(model):
        optimizer.load_state_dict(state)
        return
    names = _parameter_names(model, optimizer)
    named: Any = {
        'state': {names[number]: dict(values) for number, values in state['state'].items()},
        'param_groups': [{**group, 'params': [names[number] for number in group['params']]}
                         for group in state['param_groups']]}
    set_optimizer_state_dict(model, _unwrapped(optimizer), named, options=StateDictOptions(full_state_dict=True))


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, 'optimizer', optimizer)


def _parameter_names(model: nn.Module, optimizer: Any) -> List[str]:
    """Names of an optimizer's parameters in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group['params']]
