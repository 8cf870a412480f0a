"""Models of video and audio with several timesteps a call."""

from __future__ import annotations

import diffusers
import torch
from torch import nn

from tests.real.tiny import Arguments, moving, normal, tiny


def ltx2() -> nn.Module:
    return tiny(
        diffusers.LTX2VideoTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=1,
        caption_channels=16, vae_scale_factors=(8, 32, 32), rope_double_precision=False,
    )  # fmt: skip


def ltx2_inputs(step: int) -> Arguments:
    """Timesteps of video and audio, and for each of the two a noise level for the whole."""
    sigma = 900.0 - 40 * step
    return {
        "hidden_states": moving(step, 1, 8, 4), "audio_hidden_states": moving(step, 1, 6, 4),
        "encoder_hidden_states": normal(1, 5, 16), "audio_encoder_hidden_states": normal(1, 5, 16, seed=3),
        "timestep": torch.full((1, 8), sigma), "audio_timestep": torch.full((1, 6), sigma / 2),
        "sigma": torch.tensor([sigma]), "audio_sigma": torch.tensor([sigma / 2]),
        "num_frames": 2, "height": 2, "width": 2, "fps": 24.0, "audio_num_frames": 6,
    }  # fmt: skip


def minimax_h3() -> nn.Module:
    return tiny(
        diffusers.MiniMaxH3Transformer3DModel, hidden_size=32, num_attention_heads=2, attention_head_dim=16,
        ffn_dim=32, num_layers=2, num_refiner_layers=1, in_channels=4, audio_in_channels=4, text_dim=16, freq_dim=32,
        time_embed_hidden_dim=16, time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip


def minimax_h3_inputs(step: int) -> Arguments:
    """Text is clean, video and audio are at the timestep: two timesteps, which the tokens index."""
    tags = torch.tensor([1] * 3 + [0] * 4 + [2] * 2)
    return {
        "hidden_states": moving(step, 1, 4, 16), "audio_hidden_states": moving(step, 1, 2, 4),
        "encoder_hidden_states": normal(1, 3, 16), "timestep": torch.tensor([0.9 - 0.04 * step, 0.0]),
        "timestep_indices": (tags == 1).long(), "token_tags": tags,
        "position_ids": torch.arange(27).reshape(9, 3) % 5, "video_indices": torch.arange(3, 7),
        "audio_indices": torch.arange(7, 9), "text_indices": torch.arange(3),
    }  # fmt: skip
