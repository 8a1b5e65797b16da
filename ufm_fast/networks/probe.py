"""Neural collapse layer by layer of any ``torch.nn.Module``, from forward hooks and batches.

The features are those that a layer gives; name the activations to see what the next weight reads.
Nothing of the features is kept but their streaming statistics, so a data set of any size may pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.metrics import StreamingStatistics
from ufm_fast.networks.layers import LayerCollapse, layer_collapse, mismatches

Batches = Iterable[tuple[Tensor, Tensor]]
UNFOLDINGS = ("mean", "channels")


def probe(
    model: nn.Module,
    layers: str | type[nn.Module] | Sequence[str | type[nn.Module]],
    batches: Batches,
    classes: int,
    *,
    mismatch: bool = True,
    unfold: str = "mean",
) -> dict[str, LayerCollapse]:
    """Collapse of each layer's outputs over all batches of (inputs, labels), by the layer's name,
    in the order they run.

    layers: names as ``model.named_modules()`` has them, or module types, which stand for all layers
    of the type. Outputs of more than two dimensions, (B, C, ...): their global mean (B, C), or with
    unfold="channels" a sample for each position. mismatch: takes a second pass, so ``batches`` must
    be a list or a DataLoader, no iterator. alignment: with the weight that runs next after the
    layer, where its input side has the layer's width.

    The model runs in eval mode without gradients. Its modes, gradients and hooks are left as they
    were, also if it raises. Memory a layer: that of ``StreamingStatistics``, and one d x d matrix
    while its numbers are taken.

    >>> probe(model, torch.nn.ReLU, loader, classes=10)["relu2"].nc1_quotient

    Errors: InputError for an unknown name (the nearest ones are given) or type, a layer that does
    not run, runs twice, or gives no tensor, features that are not finite, labels that do not fit.
    Source: Rangamani et al., Feature learning in deep classifiers through intermediate neural
    collapse, ICML 2023.
    """
    if unfold not in UNFOLDINGS:
        raise InputError(f"unfold must be one of {', '.join(UNFOLDINGS)}; got {unfold!r}")
    if mismatch and isinstance(batches, Iterator):
        raise InputError(
            "batches must be read twice for the mismatch; give a list or a DataLoader, or "
            "mismatch=False"
        )
    modules = _chosen(model, layers)
    sums = {name: StreamingStatistics(classes) for name in modules}
    with _observed(model, modules) as seen:
        for outputs, labels in _passes(model, batches, seen, unfold):
            for name, features in outputs.items():
                _named(name, partial(sums[name].update, features, labels[name]))
        idle = [name for name in modules if name not in seen.order]
        if idle:
            raise InputError(
                f"layer {idle[0]!r} never ran; probe layers that the forward pass uses"
            )
        order, follows = list(seen.order), dict(seen.follows)
        found = {name: _named(name, sums[name].result) for name in order}
        wrong = dict.fromkeys(order, 0.0)
        for outputs, labels in _passes(model, batches, seen, unfold) if mismatch else ():
            for name, features in outputs.items():
                wrong[name] += mismatches(found[name], features, labels[name])
    return {
        name: layer_collapse(
            found[name], follows.get(name), wrong[name] / found[name].samples if mismatch else None
        )
        for name in order
    }


# ---- hooks


class _Seen:
    """What a forward pass left: outputs by name, the order of the layers, and the weight that ran
    next after each.
    """

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.order: list[str] = []
        self.follows: dict[str, Tensor] = {}
        self._waiting: list[str] = []

    def clear(self) -> None:
        self.outputs.clear()
        self.order.clear()
        self._waiting.clear()

    def output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in self.outputs:
                raise InputError(
                    f"layer {name!r} runs twice in a forward pass; give each use a module of its "
                    f"own"
                )
            if not isinstance(output, Tensor) or output.dim() < 2:
                raise InputTypeError(
                    f"layer {name!r} must give a tensor with a row for each sample, got "
                    f"{type(output).__name__}"
                )
            self.outputs[name] = output.detach()
            self.order.append(name)
            self._waiting.append(name)

        return hook

    def weight(self, module: nn.Module, inputs: Any) -> None:
        """Before a layer with a weight matrix runs: it follows all that have run since the last
        one.
        """
        for name in self._waiting:
            self.follows[name] = torch.as_tensor(module.weight)
        self._waiting.clear()


@contextmanager
def _observed(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[_Seen]:
    """Hooks on, eval mode; on leaving, all as it was."""
    seen, modes, handles = _Seen(), [(m, m.training) for m in model.modules()], []
    try:
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() >= 2:
                handles.append(module.register_forward_pre_hook(seen.weight))
        handles += [
            module.register_forward_hook(seen.output(name)) for name, module in modules.items()
        ]
        model.eval()
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


def _passes(
    model: nn.Module, batches: Batches, seen: _Seen, unfold: str
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Features and labels of every layer, a batch at a time."""
    wanted: set[str] | None = None
    for inputs, labels in batches:
        seen.clear()
        model(inputs)
        pairs = {
            name: _as_samples(name, output, labels, unfold) for name, output in seen.outputs.items()
        }
        wanted = set(pairs) if wanted is None else wanted
        if set(pairs) != wanted:
            raise InputError(
                f"layers {sorted(set(pairs) ^ wanted)} run in some batches only; probe them one "
                f"kind at a time"
            )
        yield (
            {name: pair[0] for name, pair in pairs.items()},
            {name: pair[1] for name, pair in pairs.items()},
        )


def _as_samples(name: str, output: Tensor, labels: Tensor, unfold: str) -> tuple[Tensor, Tensor]:
    if labels.shape != output.shape[:1]:
        raise InputError(
            f"labels must have shape ({output.shape[0]},) to match layer {name!r}, got "
            f"{tuple(labels.shape)}"
        )
    if output.dim() == 2:
        return output, labels
    places = output.flatten(2)
    if unfold == "mean":
        return places.mean(2), labels
    return places.transpose(1, 2).flatten(0, 1), labels.repeat_interleave(places.shape[2])


def _chosen(model: nn.Module, layers: Any) -> dict[str, nn.Module]:
    named = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for layer in [layers] if isinstance(layers, (str, type)) else layers:
        if isinstance(layer, type):
            chosen = {name: module for name, module in named.items() if isinstance(module, layer)}
            if not chosen:
                raise InputError(f"layers: the model has no module of type {layer.__name__}")
            found |= chosen
        elif layer in named:
            found[layer] = named[layer]
        else:
            near = (
                difflib.get_close_matches(str(layer), named, 3, 0.3)
                or [name for name in named if name][:6]
            )
            raise InputError(
                f"layers: the model has no layer {layer!r}; the nearest names are {', '.join(near)}"
            )
    return found


def _named(name: str, action: Callable[[], Any]) -> Any:
    """``action``, its error told with the layer's name."""
    try:
        return action()
    except InputError as error:
        raise type(error)(f"layer {name!r}: {error}") from error
