"""A sampler for a pipeline of diffusers, or one that is called alike: `sample(model, seed)` from a list of prompts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile.errors import OptionError
from moeca_compile.frontend.denoisers import parts_of
from moeca_compile.frontend.model_arguments import plain_module
from moeca_compile.schedule.decode import short

Prompt = str | Mapping[str, Any]
STEPS, TIMESTEPS = "num_inference_steps", "timesteps"


class PromptSampler:
    """Calls a pipeline; seed s draws prompt number s modulo the number of prompts.

    Args:
        pipeline: its call takes `generator`, and `prompt` if prompts are texts.
        prompts: at least one.
        call: further keywords of each call.
    """

    def __init__(self, pipeline: Callable[..., Any], prompts: Sequence[Prompt], call: Mapping[str, Any]) -> None:
        self._pipeline, self.prompts = pipeline, prompts
        self._parameters = _parameters(pipeline)
        self._call = dict(call)
        if "output_type" in self._parameters:
            self._call.setdefault("output_type", "pt")
        # what `inspect.signature` gives: the sampler takes timesteps if the pipeline's call does
        signature = inspect.signature(type(self).__call__)
        names = [name for name in signature.parameters if name != "self"]
        taken = [name for name in names if name != TIMESTEPS or TIMESTEPS in self._parameters]
        self.__signature__ = signature.replace(parameters=[signature.parameters[name] for name in taken])

    def __call__(
        self, model: Any, seed: int, steps: int | None = None, timesteps: Sequence[float] | None = None
    ) -> Tensor:
        """Sample one seed.

        Args:
            model: not used: it is set on the pipeline.
            seed: of the generator, and which prompt.
            steps: of the sampler; None: as `call` says.
            timesteps: of the sampler, one a step; None: its own.

        Returns:
            Images [N, C, H, W], in [0, 1] where the pipeline offers `output_type="pt"`; or videos [N, F, C, H, W].
        """
        prompt = self.prompts[seed % len(self.prompts)]
        keywords = {**self._call, **({"prompt": prompt} if isinstance(prompt, str) else prompt)}
        keywords["generator"] = torch.Generator().manual_seed(seed)
        if steps is not None:
            keywords[STEPS] = steps
        if timesteps is not None:
            keywords[TIMESTEPS] = list(timesteps)
        try:
            return samples_of(self._pipeline(**keywords))
        except (AttributeError, TypeError) as error:
            missing = _missing_for_text(self._pipeline)
            if not missing or not isinstance(prompt, str):
                raise
            embeddings = {name: "..." for name in self._parameters if re.fullmatch(r"(pooled_)?prompt_embeds", name)}
            raise OptionError(
                f"{type(self._pipeline).__name__} has no {', '.join(missing)}; without, the text {short(prompt)} can't "
                f"be encoded ({error}). Load the pipeline with its encoders, or give embeddings in place of texts: "
                f"prompts=[{embeddings or {'prompt_embeds': '...'}}]; what all calls share goes into call={{...}}"
            ) from error


def sampler_of(
    model: Any, sample: Any, prompts: Sequence[Prompt] | None, call: Mapping[str, Any] | None, what: str
) -> Callable[..., Any]:
    """The caller's sampler, or one from prompts.

    Args:
        model: a model or pipeline.
        sample: the caller's own; None: `prompts` are given.
        prompts: texts, or keywords of the pipeline's call such as `prompt_embeds`.
        call: further keywords of the pipeline's call.
        what: name of the public function, for the message.

    Raises:
        OptionError: both or none of `sample` and `prompts`; prompts that are no list, or none; prompts or `call` for
            something that isn't a pipeline; keywords that its call doesn't take.
    """
    if sample is not None:
        if prompts is not None or call is not None:
            raise OptionError(f"{what}: give a sample function, or prompts and call; a sample function makes the calls")
        if not callable(sample):
            raise OptionError(f"{what}: sample is {type(sample).__name__}, expected a function of (model, seed)")
        return sample  # type: ignore[no-any-return]
    if prompts is None:
        raise OptionError(
            f"{what}: give sample, a function of (model, seed) that returns the samples; or for a pipeline prompts, a "
            "list of texts"
        )
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise OptionError(f"{what}: prompts is {type(prompts).__name__}, expected a list of texts: prompts=['a fox']")
    if not prompts or not all(isinstance(prompt, (str, Mapping)) for prompt in prompts):
        raise OptionError(
            f"{what}: prompts={list(prompts)!r:.60}, expected at least one, each a text, or a mapping with keywords of "
            "the pipeline's call such as prompt_embeds"
        )
    if not parts_of(model) or not callable(model):
        name = type(plain_module(model) if isinstance(model, torch.nn.Module) else model).__name__
        raise OptionError(f"{what}: prompts are for a pipeline, and this is {name}. Pass the pipeline, or give sample")
    parameters, call = _parameters(model), call or {}
    names = {"generator", *call, *(["prompt"] if any(isinstance(prompt, str) for prompt in prompts) else [])}
    for prompt in prompts:
        names |= set() if isinstance(prompt, str) else set(prompt)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = sorted(names - set(parameters))
    if unknown and not takes_any:
        raise OptionError(
            f"{what}: the call of {type(model).__name__} doesn't take {', '.join(unknown)}; it takes "
            f"{', '.join(parameters)}"
        )
    return PromptSampler(model, list(prompts), call)


def takes(sample: Callable[..., Any], keyword: str) -> bool:
    """Whether the caller's loop has a parameter of that name; one that tells no signature has none."""
    try:
        return keyword in inspect.signature(sample).parameters
    except (TypeError, ValueError):
        return False


def check_seeds(sampler: object, seeds: int, what: str) -> None:
    """Refuse fewer seeds than prompts: some prompts would never be drawn.

    Raises:
        OptionError: the sampler is one from prompts, and has more of them than there are seeds.
    """
    if isinstance(sampler, PromptSampler) and len(sampler.prompts) > seeds:
        count = len(sampler.prompts)
        raise OptionError(
            f"{what}: {count} prompts, but {seeds} seeds, each of which draws one prompt: give seeds={count} or more"
        )


def samples_of(returned: Any) -> Tensor:
    """The images or videos of what a pipeline returned.

    Raises:
        OptionError: none were found in it.
    """
    for name in ("images", "frames"):
        returned = getattr(returned, name, returned)
    if isinstance(returned, tuple) and returned:
        returned = returned[0]
    if isinstance(returned, (list, tuple)) and returned:
        returned = torch.stack([_sample_of(each) for each in returned])
    return _sample_of(returned)


def _sample_of(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().float().cpu()
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):  # numpy, or an image of PIL [H, W, C]
        import numpy as np

        return torch.as_tensor(np.array(value)).float()
    raise OptionError(
        f"the pipeline returned {type(value).__name__}, in which no images were found. Give a sample function, or "
        "call={'output_type': ...} with a type that gives tensors or arrays"
    )


def _missing_for_text(pipeline: Any) -> list[str]:
    """The components that turn texts into embeddings and are None, as diffusers names them."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        return []
    return [
        name for name, part in components.items() if part is None and name.startswith(("text_encoder", "tokenizer"))
    ]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
