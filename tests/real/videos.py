"""More of diffusers' transformers for videos and sound, tiny; a table like `tests.real.zoo.ZOO`."""

from __future__ import annotations

import diffusers
import torch
from torch import nn

from tests.real.images import FLUX_LIKE, HOISTED, JOINT, image, in_parts
from tests.real.tiny import Arguments, Model, moving, normal, time, tiny


def clip(step: int, channels: int = 4) -> Arguments:
    """Two frames of 8 x 8, a prompt of six tokens."""
    return {
        "hidden_states": moving(step, 1, channels, 2, 8, 8), "timestep": torch.full((1,), 900 - 40 * step),
        "encoder_hidden_states": normal(1, 6, 12),
    }  # fmt: skip


def allegro() -> nn.Module:
    return tiny(
        diffusers.AllegroTransformer3DModel, num_attention_heads=2, attention_head_dim=24, in_channels=4,
        out_channels=4, num_layers=2, cross_attention_dim=48, sample_height=8, sample_width=8, sample_frames=2,
        caption_channels=12,
    )  # fmt: skip


def allegro_inputs(step: int) -> Arguments:
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).T.reshape(3, 1, 32)
    angles = [(normal(4, 8, seed=axis).cos(), normal(4, 8, seed=axis).sin()) for axis in range(3)]
    return {
        **clip(step), "attention_mask": torch.ones(1, 2, 8, 8), "encoder_attention_mask": torch.ones(1, 6),
        "image_rotary_emb": (tuple(angles), tuple(grid)),
    }  # fmt: skip


def cosmos() -> nn.Module:
    return tiny(
        diffusers.CosmosTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, mlp_ratio=2.0, text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 8, 8),
        patch_size=(1, 2, 2), concat_padding_mask=False,
    )  # fmt: skip


def cosmos_inputs(step: int) -> Arguments:
    return {**clip(step), "timestep": time(step, 1), "fps": 16}


def hunyuan_video() -> nn.Module:
    return tiny(
        diffusers.HunyuanVideoTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, num_single_layers=2, num_refiner_layers=1, text_embed_dim=12,
        pooled_projection_dim=10, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def hunyuan_video_inputs(step: int) -> Arguments:
    return {
        **clip(step), "encoder_attention_mask": torch.ones(1, 6), "pooled_projections": normal(1, 10),
        "guidance": torch.full((1,), 6000.0), "attention_kwargs": None,
    }  # fmt: skip


def hunyuan_video_15() -> nn.Module:
    return tiny(
        diffusers.HunyuanVideo15Transformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, num_refiner_layers=1, text_embed_dim=12, text_embed_2_dim=10,
        image_embed_dim=8, rope_axes_dim=(4, 6, 6), task_type="t2v",
    )  # fmt: skip


def hunyuan_video_15_inputs(step: int) -> Arguments:
    return {
        **clip(step), "hidden_states": moving(step, 1, 4, 2, 4, 4), "timestep": time(step, 1),
        "encoder_attention_mask": torch.ones(1, 6),
        "encoder_hidden_states_2": normal(1, 5, 10), "encoder_attention_mask_2": torch.ones(1, 5),
        "image_embeds": torch.zeros(1, 3, 8), "attention_kwargs": None,
    }  # fmt: skip


def kandinsky() -> nn.Module:
    return tiny(
        diffusers.Kandinsky5Transformer3DModel, in_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=16,
        out_visual_dim=4, model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip


def kandinsky_inputs(step: int) -> Arguments:
    frames, rows, columns = torch.arange(2), torch.arange(4), torch.arange(4)
    return {
        "hidden_states": moving(step, 1, 2, 8, 8, 4), "encoder_hidden_states": normal(1, 6, 12),
        "timestep": time(step, 1), "pooled_projections": normal(1, 10), "visual_rope_pos": [frames, rows, columns],
        "text_rope_pos": torch.arange(6), "scale_factor": (1.0, 1.0, 1.0), "sparse_params": None,
    }  # fmt: skip


def mochi() -> nn.Module:
    return tiny(
        diffusers.MochiTransformer3DModel, patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=8,
    )  # fmt: skip


def mochi_inputs(step: int) -> Arguments:
    return {
        **clip(step), "encoder_hidden_states": normal(1, 6, 16), "encoder_attention_mask": torch.ones(1, 6).bool(),
        "attention_kwargs": None,
    }  # fmt: skip


def chronoedit() -> nn.Module:
    return tiny(
        diffusers.ChronoEditTransformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=12, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        rope_temporal_skip_len=8, image_dim=8, added_kv_proj_dim=24,
    )  # fmt: skip


def chronoedit_inputs(step: int) -> Arguments:
    return {**clip(step), "encoder_hidden_states_image": normal(1, 257, 8), "attention_kwargs": None}


def skyreels() -> nn.Module:
    return tiny(
        diffusers.SkyReelsV2Transformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=12, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def skyreels_inputs(step: int) -> Arguments:
    return {**clip(step), "attention_kwargs": None}


def vace() -> nn.Module:
    return tiny(
        diffusers.WanVACETransformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=12, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32, vace_layers=[0],
        vace_in_channels=6,
    )  # fmt: skip


def vace_inputs(step: int) -> Arguments:
    return {
        **clip(step), "control_hidden_states": normal(1, 6, 2, 8, 8), "control_hidden_states_scale": torch.ones(1),
        "attention_kwargs": None,
    }  # fmt: skip


def sana_video() -> nn.Module:
    return tiny(
        diffusers.SanaVideoTransformer3DModel, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=12, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=12, sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip


def sana_video_inputs(step: int) -> Arguments:
    return {**clip(step), "timestep": time(step, 1), "encoder_attention_mask": torch.ones(1, 6, dtype=torch.int64)}


def easyanimate() -> nn.Module:
    return tiny(
        diffusers.EasyAnimateTransformer3DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, patch_size=2, sample_width=8, sample_height=8, num_layers=2, mmdit_layers=1,
        time_embed_dim=16, text_embed_dim=12, time_position_encoding_type="3d_rope",
    )  # fmt: skip


def easyanimate_inputs(step: int) -> Arguments:
    return {**clip(step), "timestep": time(step, 1)}


def latte() -> nn.Module:
    return tiny(
        diffusers.LatteTransformer3DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        num_layers=2, cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, caption_channels=12, video_length=2,
    )  # fmt: skip


def latte_inputs(step: int) -> Arguments:
    return {**clip(step), "enable_temporal_attentions": True}


def consisid() -> nn.Module:
    return tiny(
        diffusers.ConsisIDTransformer3DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, time_embed_dim=8, text_embed_dim=12, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=5, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def cogvideox_inputs(step: int) -> Arguments:
    angles = normal(32, 16)
    return {
        **clip(step), "hidden_states": moving(step, 1, 2, 4, 8, 8), "image_rotary_emb": (angles.cos(), angles.sin()),
        "attention_kwargs": None,
    }  # fmt: skip


def stable_audio() -> nn.Module:
    return tiny(
        diffusers.StableAudioDiTModel, sample_size=8, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=16,
        time_proj_dim=8, global_states_input_dim=10, cross_attention_input_dim=12,
    )  # fmt: skip


def stable_audio_inputs(step: int) -> Arguments:
    angles = normal(9, 8)  # the global states are a token before those of the sound
    return {
        "hidden_states": moving(step, 2, 4, 8), "timestep": time(step, 1, 1e-3),
        "encoder_hidden_states": normal(2, 6, 12), "global_hidden_states": normal(2, 1, 10),
        "rotary_embedding": (angles.cos(), angles.sin()),
        "return_dict": False,  # its output class warns when it is made
    }  # fmt: skip


CROSS = ("attention", "attention", "mlp") * 2, ("self", "cross, fixed") * 2  # to itself, to the prompt

VIDEOS: dict[str, Model] = {
    "Allegro": image(allegro, allegro_inputs, *CROSS),
    "Cosmos": image(cosmos, cosmos_inputs, *CROSS, ("a residual around 3 others",)),
    "HunyuanVideo": image(
        hunyuan_video, hunyuan_video_inputs, FLUX_LIKE[0], ("self, fixed", *FLUX_LIKE[1]), (HOISTED, HOISTED)
    ),
    "HunyuanVideo15": in_parts(
        hunyuan_video_15, hunyuan_video_15_inputs, "It asks on the host whether the given image is all zeros"
    ),
    "Kandinsky5": image(  # the blocks of the prompt depend on the timestep
        kandinsky, kandinsky_inputs, CROSS[0], ("self", "self", "cross", "self", "cross"), (HOISTED, HOISTED)
    ),
    "Mochi": in_parts(mochi, mochi_inputs, "Its attention picks each sample's tokens by the prompt's mask"),
    "ChronoEdit": image(chronoedit, chronoedit_inputs, CROSS[0], ("self", "cross, fixed", "cross, fixed") * 2),
    "SkyReelsV2": image(skyreels, skyreels_inputs, *CROSS),
    "WanVACE": image(vace, vace_inputs, CROSS[0] + CROSS[0][:3], CROSS[1] + CROSS[1][:2]),
    "SanaVideo": image(sana_video, sana_video_inputs, ("mlp", "attention", "mlp") * 2, ("cross, fixed",) * 2),
    "EasyAnimate": image(easyanimate, easyanimate_inputs, *JOINT),
    "Latte": image(  # a block of each frame, then one of each place
        latte, latte_inputs, ("attention", "attention", "mlp", "attention", "mlp") * 2,
        ("self", "cross, fixed", "self") * 2,
    ),
    "ConsisID": image(consisid, cogvideox_inputs, ("attention x2", "mlp x2") * 2, ("joint", "joint")),
    "StableAudio": image(
        stable_audio, stable_audio_inputs, ("mlp", *CROSS[0], "mlp"), CROSS[1]
    ),
}  # fmt: skip
