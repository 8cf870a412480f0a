"""Real model code: tiny random builds of diffusers' transformers, called as their pipelines call them.

One table, `ZOO`: how to build a model, its arguments at a step of a trajectory, and what must be found in it, read off
its code. Tests run over it; a table of models can be made from it.
"""

from __future__ import annotations

import diffusers
import torch
from torch import nn

from tests.real.images import IMAGES
from tests.real.tiny import Arguments, Model, moving, normal, time, tiny
from tests.real.video_and_audio import ltx2, ltx2_inputs, minimax_h3, minimax_h3_inputs
from tests.real.videos import VIDEOS, cogvideox_inputs


def hidream() -> nn.Module:
    return tiny(
        diffusers.HiDreamImageTransformer2DModel, patch_size=2, in_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=24, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1],
    )  # fmt: skip


def hidream_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "timesteps": time(step),
        "encoder_hidden_states_t5": normal(2, 6, 32), "encoder_hidden_states_llama3": normal(2, 2, 6, 16),
        "pooled_embeds": normal(2, 24), "attention_kwargs": None,
    }  # fmt: skip


def nucleus(use_grouped_mm: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny(
        diffusers.NucleusMoEImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=3,
        attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4), moe_enabled=True, dense_moe_strategy="leave_first_block_dense", num_experts=4,
        moe_intermediate_dim=32, capacity_factors=2.0, use_grouped_mm=use_grouped_mm,
    )  # fmt: skip
    return model.to(dtype)


def nucleus_inputs(step: int, dtype: torch.dtype = torch.float32) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 16, 16).to(dtype), "timestep": time(step, scale=1e-3).to(dtype),
        "encoder_hidden_states": normal(2, 7, 16).to(dtype),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.int64), "img_shapes": [(1, 4, 4)] * 2,
        "attention_kwargs": {},
    }  # fmt: skip


def dit() -> nn.Module:
    return tiny(
        diffusers.DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def dit_inputs(step: int) -> Arguments:
    t = torch.full((2,), 900 - 40 * step)
    return {"hidden_states": moving(step, 2, 4, 8, 8), "timestep": t, "class_labels": torch.tensor([1, 10])}


def pixart() -> nn.Module:
    return tiny(
        diffusers.PixArtTransformer2DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=2, sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12,
        num_embeds_ada_norm=1000, use_additional_conditions=False,
    )  # fmt: skip


def pixart_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "encoder_hidden_states": normal(2, 6, 12),
        "encoder_attention_mask": torch.ones(2, 6), "timestep": torch.full((2,), 900 - 40 * step),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def sd3() -> nn.Module:
    return tiny(
        diffusers.SD3Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=20, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def sd3_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "timestep": time(step), "encoder_hidden_states": normal(2, 6, 12),
        "pooled_projections": normal(2, 20), "joint_attention_kwargs": None,
    }  # fmt: skip


def flux() -> nn.Module:
    return tiny(
        diffusers.FluxTransformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def flux_inputs(step: int) -> Arguments:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = torch.stack([torch.zeros(4, 4), rows, columns], dim=-1).view(16, 3)
    return {
        "hidden_states": moving(step, 1, 16, 4), "timestep": time(step, 1, 1e-3), "guidance": torch.full((1,), 3.5),
        "pooled_projections": normal(1, 20), "encoder_hidden_states": normal(1, 40, 24), "txt_ids": torch.zeros(40, 3),
        "img_ids": places, "joint_attention_kwargs": {},
    }  # fmt: skip


def wan() -> nn.Module:
    return tiny(
        diffusers.WanTransformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
        in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip


def wan_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 1, 4, 2, 8, 8), "timestep": torch.full((1,), 900 - 40 * step),
        "encoder_hidden_states": normal(1, 6, 16), "attention_kwargs": None,
    }  # fmt: skip


def wan_image_inputs(step: int) -> Arguments:
    """A video from its first frame, whose tokens are clean: a timestep for each token."""
    tokens = torch.cat([torch.zeros(1, 16), torch.full((1, 16), 900.0 - 40 * step)], dim=1)
    return {**wan_inputs(step), "timestep": tokens}


def hunyuan() -> nn.Module:
    return tiny(
        diffusers.HunyuanDiT2DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2,
        sample_size=8, hidden_size=16, num_layers=4, mlp_ratio=2.0, cross_attention_dim=12, cross_attention_dim_t5=16,
        pooled_projection_dim=4, text_len=4, text_len_t5=4,
    )  # fmt: skip


def hunyuan_inputs(step: int) -> Arguments:
    angles = normal(16, 8)
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "timestep": time(step), "encoder_hidden_states": normal(2, 4, 12),
        "text_embedding_mask": torch.ones(2, 4, dtype=torch.int64), "encoder_hidden_states_t5": normal(2, 4, 16),
        "text_embedding_mask_t5": torch.ones(2, 4, dtype=torch.int64), "style": torch.zeros(2, dtype=torch.int64),
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 1024.0, 1024.0, 0.0, 0.0]] * 2),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def auraflow() -> nn.Module:
    return tiny(
        diffusers.AuraFlowTransformer2DModel, sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip


def auraflow_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "encoder_hidden_states": normal(2, 6, 12),
        "timestep": time(step, scale=1e-3), "attention_kwargs": None,
    }  # fmt: skip


def cogvideox() -> nn.Module:
    return tiny(
        diffusers.CogVideoXTransformer3DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, time_embed_dim=8, text_embed_dim=12, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=5, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def qwen() -> nn.Module:
    return tiny(
        diffusers.QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def qwen_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 1, 16, 16), "timestep": time(step, 1, 1e-3), "guidance": None,
        "encoder_hidden_states_mask": None, "encoder_hidden_states": normal(1, 7, 16), "img_shapes": [[(1, 4, 4)]],
        "attention_kwargs": {},
    }  # fmt: skip


def zimage() -> nn.Module:
    return tiny(
        diffusers.ZImageTransformer2DModel, all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32,
        n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )  # fmt: skip


def zimage_inputs(step: int) -> Arguments:
    return {
        "x": list(moving(step, 1, 4, 1, 8, 8).unbind(0)), "t": 1 - time(step, 1, 1e-3), "cap_feats": [normal(7, 16)],
        "joint_attention_kwargs": None,
    }  # fmt: skip


def lumina2() -> nn.Module:
    return tiny(
        diffusers.Lumina2Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 64, 64), cap_feat_dim=16,
    )  # fmt: skip


def lumina2_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "timestep": 1 - time(step, scale=1e-3),
        "encoder_hidden_states": normal(2, 6, 16), "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "attention_kwargs": None,
    }  # fmt: skip


def ltx() -> nn.Module:
    return tiny(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, num_layers=2, caption_channels=12,
    )  # fmt: skip


def ltx_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 32, 8), "encoder_hidden_states": normal(2, 6, 12),
        "timestep": torch.full((2,), 900 - 40 * step), "encoder_attention_mask": torch.ones(2, 6, dtype=torch.int64),
        "num_frames": 2, "height": 4, "width": 4, "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
    }  # fmt: skip


def sana() -> nn.Module:
    return tiny(
        diffusers.SanaTransformer2DModel, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=12, sample_size=8,
    )  # fmt: skip


def sana_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 8, 8), "encoder_hidden_states": normal(2, 6, 12),
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.int64), "timestep": time(step), "attention_kwargs": None,
    }  # fmt: skip


def ernie() -> nn.Module:
    return tiny(
        diffusers.ErnieImageTransformer2DModel, hidden_size=32, num_attention_heads=2, num_layers=3,
        ffn_hidden_size=48, in_channels=4, out_channels=4, text_in_dim=12, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def ernie_inputs(step: int) -> Arguments:
    return {
        "hidden_states": moving(step, 2, 4, 4, 4), "timestep": time(step), "text_bth": normal(2, 6, 12),
        "text_lens": torch.tensor([6, 4]),
    }  # fmt: skip


def unet() -> nn.Module:
    return tiny(
        diffusers.UNet2DConditionModel, sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12, attention_head_dim=2,
        norm_num_groups=8,
    )  # fmt: skip


def unet_inputs(step: int) -> Arguments:
    t = torch.full((2,), 900 - 40 * step)
    return {"sample": moving(step, 2, 4, 8, 8), "timestep": t, "encoder_hidden_states": normal(2, 6, 12)}


CROSS = ("attention", "attention", "mlp")  # to itself, to the prompt
NOT_LATENT = "doesn't depend on the latent"
PARTS = "Lumina2 counts the prompt's tokens on the host, and compares the counts: one graph would fit one prompt only"

ZOO: dict[str, Model] = {
    "HiDreamImage": Model(
        hidream, hidream_inputs, "timesteps", "hidden_states",
        ("attention x2", "experts", "mlp", "attention", "experts"), ("joint", "self"),
    ),
    "NucleusMoEImage": Model(
        nucleus, nucleus_inputs, "timestep", "hidden_states",
        ("attention", "mlp", *("attention", "experts") * 2), ("joint",) * 3,
    ),
    "DiT": Model(dit, dit_inputs, "timestep", "hidden_states", ("attention", "mlp") * 2, ("self",) * 2),
    "PixArt": Model(pixart, pixart_inputs, "timestep", "hidden_states", CROSS * 2, ("self", "cross, fixed") * 2),
    "SD3": Model(
        sd3, sd3_inputs, "timestep", "hidden_states",
        ("attention x2", "attention", "mlp", "mlp", "attention x2", "mlp", "mlp", "attention", "mlp"),
        ("joint", "self", "joint", "joint"),
    ),
    "Flux": Model(
        flux, flux_inputs, "timestep", "hidden_states",
        ("attention x2", "mlp", "mlp", "attention", "attention"), ("joint", "self", "self"),
    ),
    "Wan": Model(wan, wan_inputs, "timestep", "hidden_states", CROSS * 2, ("self", "cross, fixed") * 2),
    "Wan, an image to a video": Model(
        wan, wan_image_inputs, "timestep", "hidden_states", CROSS * 2, ("self", "cross, fixed") * 2
    ),
    "LTX2Video": Model(
        ltx2, ltx2_inputs, "timestep", "hidden_states", (*("attention",) * 6, "mlp", "mlp"),
        ("self", "self", "cross, fixed", "cross, fixed", "cross", "cross"),
    ),
    "MiniMaxH3": Model(
        minimax_h3, minimax_h3_inputs, "timestep", "hidden_states", ("attention", "mlp") * 2,
        ("self, fixed", "self", "self"), ("doesn't depend on the latent",) * 2,
    ),
    "HunyuanDiT": Model(
        hunyuan, hunyuan_inputs, "timestep", "hidden_states",
        CROSS * 4, ("self, fixed", *("self", "cross, fixed") * 4),  # the first pools the prompt
    ),
    "AuraFlow": Model(
        auraflow, auraflow_inputs, "timestep", "hidden_states",
        ("attention x2", "mlp", "mlp", "attention", "mlp"), ("joint", "self"),
    ),
    "CogVideoX": Model(
        cogvideox, cogvideox_inputs, "timestep", "hidden_states",
        ("attention x2", "mlp x2", "attention x2", "mlp"), ("joint", "joint"),
    ),
    "QwenImage": Model(
        qwen, qwen_inputs, "timestep", "hidden_states",
        ("attention x2", "mlp", "mlp", "attention", "mlp"), ("joint", "joint"),
    ),
    "ZImage": Model(
        zimage, zimage_inputs, "t", "x_0",
        ("attention", "mlp") * 3, ("self", "self, fixed", "self", "self"), rejected=(NOT_LATENT, NOT_LATENT),
    ),
    "Lumina2": Model(lumina2, lumina2_inputs, "timestep", "hidden_states", in_parts=PARTS),
    "LTXVideo": Model(ltx, ltx_inputs, "timestep", "hidden_states", CROSS * 2, ("self", "cross, fixed") * 2),
    "ErnieImage": Model(  # one adaLN for all layers, expanded to the tokens
        ernie, ernie_inputs, "timestep", "hidden_states", ("attention", "mlp") * 3, ("self",) * 3,
    ),
    "UNet2DCondition": Model(  # a block of convolutions that keeps its width is a branch like another
        unet, unet_inputs, "timestep", "sample", ("mlp", *CROSS, "mlp", *CROSS, "mlp", *CROSS * 2),
        ("self", "cross, fixed") * 4, rejected=("a residual around 3 others",) * 4,
    ),
    "Sana": Model(  # linear attention is no softmax: found as what lies along a residual
        sana, sana_inputs, "timestep", "hidden_states", ("mlp", "attention", "mlp") * 2, ("cross, fixed",) * 2,
    ),
    **IMAGES,
    **VIDEOS,
}  # fmt: skip
