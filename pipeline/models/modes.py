"""A model's modes: of training, and which parameters have gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Put back what `EditableModel` changes of somebody's model, which it freezes to work on it."""
    training = {module: module.training for module in model.modules()}
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter, had in learning.items():
            parameter.requires_grad_(had)
