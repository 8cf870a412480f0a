"""Whether experts are still what was proven: the same classes, without hooks, adapters or weights of another kind.

Quantized weights that say their values are no other kind: the operator gets the values.

`compare` runs while Dynamo traces a rewritten dispatch. What it reads becomes guards, so a later change of an expert
traces the model anew; a step pays one guard a module for it. Forward hooks that are put on later are guarded as
`torch._dynamo.config.skip_nnmodule_hook_guards` says, which is what holds for `torch.compile` everywhere.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

SAME, ADAPTED, CHANGED = 0, 1, 2  # what `compare` finds, the worse the higher
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LAYER = "base_layer"  # where peft's adapter layers, of every kind, keep the module that they stand in for


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A module's class, names and shapes of its parameters, and its submodules; adapters are looked through.

    `on_meta`: it was proven without data, for a dry run. Otherwise a weight on the meta device is offloaded.
    """

    kind: type
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    children: tuple[tuple[str, Anatomy], ...]
    on_meta: bool = False


def anatomy_of(module: nn.Module) -> Anatomy:
    bare = beneath_adapters(module)
    children = tuple((name, anatomy_of(child)) for name, child in bare._modules.items() if child is not None)
    parameters = tuple((name, tuple(p.shape)) for name, p in bare._parameters.items() if p is not None)
    return Anatomy(type(bare), parameters, children, any(p.is_meta for p in bare.parameters()))


def compare(module: nn.Module, proven: Anatomy) -> int:
    """SAME; ADAPTED: an adapter stands before a module or a weight is of another kind, so that the module's own forward
    still says what it computes; CHANGED: another class, a hook, a replaced forward, or a weight that isn't there."""
    if type(module) is not proven.kind:
        if not is_adapter(module) or is_hooked(module):
            return CHANGED
        return max(ADAPTED, compare(module._modules[_LAYER], proven))  # type: ignore[arg-type]
    if is_hooked(module):
        return CHANGED
    worst = SAME
    for name, shape in proven.parameters:
        parameter = module._parameters.get(name)
        if parameter is None or parameter.shape != shape:
            return CHANGED
        if parameter.device.type == "meta" and not proven.on_meta:
            return CHANGED
        if not (is_plain(parameter) or is_dequantizable(parameter)):
            worst = ADAPTED
    for name, part in proven.children:
        child = module._modules.get(name)
        if child is None:
            return CHANGED
        worst = max(worst, compare(child, part))
        if worst == CHANGED:
            return CHANGED
    return worst


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs anything but its class's forward."""
    forward = module.forward  # reading it is what Dynamo guards
    if "forward" in module.__dict__ and getattr(forward, "__func__", None) is not type(module).forward:
        return True  # accelerate leaves the class's own behind, bound, when it takes its hooks off
    return bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def is_adapter(module: nn.Module) -> bool:
    return _LAYER in module._modules and hasattr(module, "get_base_layer")


def is_plain(p: Tensor) -> bool:
    """Whether a parameter is an ordinary dense tensor (or what a tracer has in its place): nothing quantized."""
    return p.dtype in _PLAIN and (type(p) is nn.Parameter or isinstance(p, (FakeTensor, FunctionalTensor)))


# Attributes by which torchao's weights ask for activations that are quantized, or scaled, too.
_OF_ACTIVATIONS = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")


def is_dequantizable(p: Tensor) -> bool:
    """Whether a parameter is a quantized tensor of torchao's that is multiplied by as `p.dequantize()` is: only the
    weights are quantized. Classes of others may have a method of this name, and multiply otherwise."""
    if type(p) is nn.Parameter or not type(p).__module__.startswith("torchao."):
        return False
    return p.dtype in _PLAIN and all(getattr(p, name, None) is None for name in _OF_ACTIVATIONS)


def values_of(p: Tensor) -> Tensor:
    """A parameter as an ordinary tensor."""
    return p.dequantize() if is_dequantizable(p) else p


def compute_dtype(*modules: nn.Module) -> torch.dtype:
    """What modules compute in whose weights may be stored in another way: the first of their dtypes that multiplies."""
    dtypes = (p.dtype for module in modules for p in module.parameters())
    return next((dtype for dtype in dtypes if dtype in _PLAIN), torch.float32)


def beneath_adapters(module: nn.Module) -> nn.Module:
    """The module that adapter layers stand in for; without any, the module itself."""
    while is_adapter(module):
        module = module._modules[_LAYER]  # type: ignore[assignment]
    return module


def leaves(module: nn.Module) -> int:
    """How many modules without submodules it holds; an adapter layer counts as the module it stands in for."""
    bare = beneath_adapters(module)
    children = [child for child in bare._modules.values() if child is not None]
    return sum(map(leaves, children)) if children else 1


def adapters(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, what is there) of each adapter layer and each weight that is no plain tensor."""
    for path, part in module.named_modules():
        if is_adapter(part):
            yield path, f"an adapter ({_named(type(part))})"
    for path, p in module.named_parameters():
        if not (is_plain(p) or is_dequantizable(p)):
            yield path, f"a {type(p).__name__} of {str(p.dtype).removeprefix('torch.')}"


def hooks(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, which hook) of each module whose call runs more than its class's forward."""
    for path, part in module.named_modules():
        if is_hooked(part) and (part._forward_hooks or part._forward_pre_hooks or not _is_its_own(part)):
            yield path, _hook(part)


def _is_its_own(module: nn.Module) -> bool:
    """Whether the forward on an instance is still its class's: compiled, `module.forward = torch.compile(...)`, or put
    there by `patch` or `isolate`, which both mark the code."""
    forward: object = module.forward
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if getattr(forward, "__func__", None) is type(module).forward:
        return True
    code = getattr(forward, "__code__", None) if isinstance(forward, types.MethodType) else None
    return code is not None and any(
        isinstance(constant, str) and constant.startswith("moeca ") for constant in code.co_consts
    )


def _hook(module: nn.Module) -> str:
    attributes = vars(module)
    if "_hf_hook" in attributes:
        parts = getattr(attributes["_hf_hook"], "hooks", (attributes["_hf_hook"],))
        return f"an accelerate hook ({', '.join(type(part).__name__ for part in parts)})"
    if "_diffusers_hook" in attributes:
        return f"a diffusers hook ({', '.join(getattr(attributes['_diffusers_hook'], 'hooks', ()))})"
    if "forward" in attributes and not _is_its_own(module):
        return "a forward that was replaced on the instance"
    hook = next(iter((*module._forward_pre_hooks.values(), *module._forward_hooks.values())))
    return f"a forward hook ({getattr(hook, '__qualname__', type(hook).__name__)})"


def remedy(what: str) -> str:
    """What to do about a hook that `hooks` found."""
    if "accelerate" in what or "group_offloading" in what:
        return (
            "take the hooks off, accelerate.hooks.remove_hook_from_module(model, recurse=True), or load without them, "
            "and offload the whole model instead, enable_model_cpu_offload()"
        )
    if "layerwise_casting" in what:
        return "load the weights in the dtype that they compute in instead"
    return "take it off first"


def _named(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]} {kind.__qualname__}"
