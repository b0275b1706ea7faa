"""What a loader's batch and a model's output are taken apart into: the one place that knows their forms.

A batch is ``(input, target)``, ``(input, target, sample_weight)``, or a mapping of the model's arguments with the labels under
``"labels"``, as in Hugging Face's libraries. A model returns logits, or something that holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LABELS = ("labels", "label", "target", "targets")
"""Where a mapping may hold the labels, the first of them that it has."""
WEIGHT = "sample_weight"
"""Where it may hold the sample weights."""

_FORMS = (
    "(input, target), (input, target, sample_weight), or a mapping of the model's arguments with the labels under 'labels' and, if "
    "there are any, the weights under 'sample_weight'"
)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, an object or a mapping with ``logits`` (such as Hugging Face's ModelOutput), or a
    tuple with the logits first, or second after a scalar loss.

    Raises:
        TypeError: none of these.
    """
    found = output
    if isinstance(found, Mapping):
        found = found.get("logits")
    elif not isinstance(found, Tensor) and hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, (tuple, list)) and found:
        scalar = isinstance(found[0], Tensor) and found[0].dim() == 0
        found = found[1] if scalar and len(found) > 1 else found[0]
    if isinstance(found, Tensor):
        return found
    keys = f" with the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise TypeError(
        f"the model must return logits as a tensor, or something that has them as .logits or ['logits'], got "
        f"{type(output).__name__}{keys}: pass a function that returns them, such as lambda x: model(x).scores"
    )


def classes_second(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of tokens (N, L, C), as Hugging Face's models give them, as (N, C, L); soft targets likewise."""
    if logits.dim() == 3 and isinstance(target, Tensor):
        if target.shape == logits.shape[:-1]:
            return logits.movedim(-1, 1), target
        if target.shape == logits.shape and target.is_floating_point():
            return logits.movedim(-1, 1), target.movedim(-1, 1)
    return logits, target


def take_apart(batch: Any) -> tuple[Any, Any, Any]:
    """What the model is to be called with, the target, and the sample weights or None. The first is a ``dict`` if it is to be called
    with keywords.

    Raises:
        TypeError: weights that are no floating point tensor: an index of the samples, say, which some data sets give.
        ValueError: another form.
    """
    if isinstance(batch, Mapping):
        name = next((name for name in LABELS if name in batch), None)
        if name is None:
            raise ValueError(
                f"a batch that is a mapping must hold the labels under 'labels', got the keys {sorted(map(str, batch))}: pass "
                "(input, target) pairs, such as ((batch['x'], batch['noisy']) for batch in loader)"
            )
        arguments = {key: value for key, value in batch.items() if key not in (name, WEIGHT)}
        target, weight = batch[name], batch.get(WEIGHT)
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        arguments, target = batch[0], batch[1]
        weight = batch[2] if len(batch) == 3 else None
        if isinstance(arguments, Mapping):
            arguments = dict(arguments)
    else:
        what = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(f"each batch of the loader must be {_FORMS}; got {what}")
    if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point()):
        _raise_for_no_weights(batch, weight)
    return arguments, target, weight


def _raise_for_no_weights(batch: Any, weight: Any) -> None:
    """Many data sets give the index of a sample, or its file, as a third item."""
    kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
    must = "must be sample weights, a tensor of floating point numbers"
    if isinstance(weight, Tensor) and weight.dtype == torch.bool:
        must += " (of a mask: .float())"
    if isinstance(batch, Mapping):
        raise TypeError(f"the {WEIGHT!r} of a batch {must}, got {kind}")
    index, x = batch[0], batch[1]
    first = _is_index(index) and isinstance(x, Tensor) and (x.is_floating_point() or x.dim() > 1)
    way = "((x, y) for _, x, y in loader)" if first else "((x, y) for x, y, _ in loader)"
    raise TypeError(
        f"the third item of a batch {must}, got {kind}: if the {'first' if first else 'third'} item is an index of the samples or the "
        f"like, leave it out: {way}"
    )


def _is_index(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() <= 1 and not value.is_floating_point()
    return isinstance(value, (int, str)) or (isinstance(value, (tuple, list)) and all(isinstance(part, (int, str)) for part in value))


def to_device(value: Any, device: torch.device | None) -> Any:
    """The same with all tensors on ``device``, in tuples, lists and mappings too; as it is for None."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(part, device) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(part, device) for part in value)
    return value


def device_of(model: object) -> torch.device | None:
    """Of the first parameter of a module; None if there is none."""
    if not isinstance(model, nn.Module):
        return None
    return next((parameter.device for parameter in model.parameters()), None)


def outputs(batch: Any, model: nn.Module | Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The model's logits for a batch, the target and the sample weights, on the device of the model.

    Raises:
        TypeError, ValueError: a batch or an output of another form.
    """
    arguments, target, weight = to_device(take_apart(batch), device_of(model))
    output = model(**arguments) if isinstance(arguments, dict) else model(arguments)
    if isinstance(output, Tensor):
        return output, target, weight
    return *classes_second(logits_of(output), target), weight


@contextmanager
def eval_mode(model: object) -> Iterator[None]:
    """A module in eval mode, and afterwards every submodule in the mode that it had."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
