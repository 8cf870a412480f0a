"""More of diffusers' transformers for images and for embeddings of them, tiny; a table like `tests.real.zoo.ZOO`."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.real.tiny import Arguments, Model, moving, normal, time, tiny

SIDE = 4  # of the latent, in tokens


def places(side: int = SIDE, axes: int = 3) -> Tensor:
    """Ids [side * side, axes] of an image's tokens: the last two are row and column."""
    rows, columns = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    others = [torch.zeros(side, side)] * (axes - 2)
    return torch.stack([*others, rows, columns], dim=-1).view(side * side, axes)


def flux_like(step: int, tokens: int = 6) -> Arguments:
    """Packed latents, a prompt, and the places of both."""
    return {
        "hidden_states": moving(step, 1, SIDE * SIDE, 4), "timestep": time(step, 1, 1e-3),
        "encoder_hidden_states": normal(1, tokens, 24), "txt_ids": torch.zeros(tokens, 3), "img_ids": places(),
    }  # fmt: skip


def chroma() -> nn.Module:
    return tiny(
        diffusers.ChromaTransformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip


def chroma_inputs(step: int) -> Arguments:
    mask = torch.ones(1, 6 + SIDE * SIDE)
    return {**flux_like(step), "attention_mask": mask, "joint_attention_kwargs": {}}


def bria() -> nn.Module:
    return tiny(
        diffusers.BriaTransformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


def bria_inputs(step: int) -> Arguments:
    return flux_like(step)


def bria_fibo() -> nn.Module:
    return tiny(
        diffusers.BriaFiboTransformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=[4, 4, 8],
        text_encoder_dim=12,
    )  # fmt: skip


def bria_fibo_inputs(step: int) -> Arguments:
    layers = [normal(1, 6, 12, seed=number) for number in range(3)]
    mask = torch.zeros(1, 1, 6 + SIDE * SIDE, 6 + SIDE * SIDE)
    return {**flux_like(step), "text_encoder_layers": layers, "joint_attention_kwargs": {"attention_mask": mask}}


def longcat() -> nn.Module:
    return tiny(
        diffusers.LongCatImageTransformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=24,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


def longcat_inputs(step: int) -> Arguments:
    return {**flux_like(step), "guidance": None}


def ovis() -> nn.Module:
    return tiny(
        diffusers.OvisImageTransformer2DModel, patch_size=1, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def ovis_inputs(step: int) -> Arguments:
    return {**flux_like(step), "joint_attention_kwargs": None}


def flux2() -> nn.Module:
    return tiny(
        diffusers.Flux2Transformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def flux2_inputs(step: int) -> Arguments:
    return {
        **flux_like(step), "txt_ids": torch.zeros(1, 6, 4), "img_ids": places(axes=4)[None],
        "guidance": torch.full((1,), 3.5), "joint_attention_kwargs": None,
    }  # fmt: skip


def cogview3() -> nn.Module:
    return tiny(
        diffusers.CogView3PlusTransformer2DModel, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, text_embed_dim=12, time_embed_dim=16, condition_dim=4,
        pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip


def sizes(batch: int = 2) -> Arguments:
    return {
        "original_size": torch.full((batch, 2), 64.0), "target_size": torch.full((batch, 2), 64.0),
        "crop_coords": torch.zeros(batch, 2),
    }  # fmt: skip


def cogview3_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "encoder_hidden_states": normal(2, 6, 12), "timestep": time(step),
        **sizes(),
    }  # fmt: skip


def cogview4() -> nn.Module:
    return tiny(
        diffusers.CogView4Transformer2DModel, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, text_embed_dim=12, time_embed_dim=16, condition_dim=4,
        sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip


def cogview4_inputs(step: int) -> Arguments:
    return {**cogview3_inputs(step), "attention_kwargs": None}


def glm() -> nn.Module:
    return tiny(
        diffusers.GlmImageTransformer2DModel, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, text_embed_dim=12, time_embed_dim=16, condition_dim=4,
        prior_vq_quantizer_codebook_size=32,
    )  # fmt: skip


def glm_inputs(step: int) -> Arguments:
    given = cogview3_inputs(step)
    del given["original_size"]
    return {
        **given, "prior_token_id": torch.arange(32).view(2, 16), "prior_token_drop": torch.zeros(2, 16).bool(),
        "attention_kwargs": None,
    }  # fmt: skip


def hunyuan_image() -> nn.Module:
    return tiny(
        diffusers.HunyuanImageTransformer2DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, num_single_layers=2, num_refiner_layers=1, text_embed_dim=12,
        rope_axes_dim=(8, 8),
    )  # fmt: skip


def hunyuan_image_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 1, 4, SIDE, SIDE), "timestep": time(step, 1),
        "encoder_hidden_states": normal(1, 6, 12), "encoder_attention_mask": torch.ones(1, 6),
        "attention_kwargs": None,
    }  # fmt: skip


def prx() -> nn.Module:
    return tiny(
        diffusers.PRXTransformer2DModel, in_channels=4, patch_size=2, context_in_dim=12, hidden_size=32, num_heads=2,
        depth=2, axes_dim=[8, 8],
    )  # fmt: skip


def prx_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "timestep": time(step, scale=1e-3),
        "encoder_hidden_states": normal(2, 6, 12), "attention_mask": torch.ones(2, 6).bool(),
    }  # fmt: skip


def lumina() -> nn.Module:
    return tiny(
        diffusers.LuminaNextDiT2DModel, sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, cross_attention_dim=12,
    )  # fmt: skip


def lumina_inputs(step: int) -> Arguments:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "timestep": 1 - time(step, scale=1e-3),
        "encoder_hidden_states": normal(2, 6, 12), "encoder_mask": torch.ones(2, 6),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 8, 8), "cross_attention_kwargs": {},
    }  # fmt: skip


def omnigen() -> nn.Module:
    return tiny(
        diffusers.OmniGenTransformer2DModel, in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=48, num_layers=2, pad_token_id=0, vocab_size=64, time_step_dim=16,
        pos_embed_max_size=8,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    )  # fmt: skip


def omnigen_inputs(step: int) -> Arguments:
    prompt = 6
    length = prompt + 1 + SIDE * SIDE  # the prompt, the time, the image
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "timestep": 1 - time(step, scale=1e-3),
        "input_ids": torch.arange(2 * prompt).view(2, prompt) + 1, "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": torch.ones(2, length, length), "position_ids": torch.arange(length).expand(2, -1),
    }  # fmt: skip


def prior() -> nn.Module:
    return tiny(
        diffusers.PriorTransformer, num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12,
        num_embeddings=6, additional_embeddings=4,
    )  # fmt: skip


def prior_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 12), "timestep": torch.tensor(900 - 40 * step),
        "proj_embedding": normal(2, 12, seed=3), "encoder_hidden_states": normal(2, 6, 12),
        "attention_mask": torch.ones(2, 6).bool(),
    }  # fmt: skip


FLUX_LIKE = ("attention x2", "mlp", "mlp", "attention", "attention"), ("joint", "self", "self")
JOINT = ("attention x2", "mlp", "mlp", "attention", "mlp"), ("joint", "joint")
SINGLE = ("attention", "mlp") * 2
HOISTED = "doesn't depend on the latent: hoisted, not cached"


def image(build: Callable[[], nn.Module], inputs: Callable[[int], Arguments], *found: tuple[str, ...]) -> Model:
    return Model(build, inputs, "timestep", "hidden_states", *found)


def in_parts(build: Callable[[], nn.Module], inputs: Callable[[int], Arguments], reason: str) -> Model:
    return Model(build, inputs, "timestep", "hidden_states", in_parts=reason)


IMAGES: dict[str, Model] = {
    "Chroma": image(chroma, chroma_inputs, *FLUX_LIKE, (HOISTED,)),  # its modulations come from the timestep alone
    "Bria": image(bria, bria_inputs, *FLUX_LIKE),
    "BriaFibo": image(bria_fibo, bria_fibo_inputs, *FLUX_LIKE),
    "LongCatImage": image(longcat, longcat_inputs, *FLUX_LIKE),
    "OvisImage": image(ovis, ovis_inputs, *FLUX_LIKE),
    "Flux2": image(flux2, flux2_inputs, *FLUX_LIKE),
    "CogView3Plus": image(
        cogview3, cogview3_inputs, ("attention x2", "mlp x2", "attention x2", "mlp"), ("joint", "joint")
    ),
    "CogView4": image(cogview4, cogview4_inputs, *JOINT),
    "GlmImage": in_parts(glm, glm_inputs, "It writes to the rows that a mask picks"),
    "HunyuanImage": image(
        hunyuan_image, hunyuan_image_inputs, FLUX_LIKE[0], ("self, fixed", *FLUX_LIKE[1]), (HOISTED, HOISTED)
    ),
    "PRX": image(prx, prx_inputs, SINGLE, ("joint", "joint")),
    "LuminaNext": image(lumina, lumina_inputs, SINGLE, ("self", "cross, fixed") * 2),
    "OmniGen": in_parts(omnigen, omnigen_inputs, "Its rotary embedding compares a position with a limit on the host"),
    "Prior": image(prior, prior_inputs, SINGLE, ("self", "self")),
}  # fmt: skip
