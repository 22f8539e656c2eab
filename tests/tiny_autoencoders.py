"""Every class of diffusers' that encodes pictures or clips, made small."""

from typing import Any

import torch

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_BLOCKS = {
    "down_block_types": (_DOWN,) * 2, "up_block_types": (_UP,) * 2, "norm_num_groups": 4
}  # fmt: skip
_PLAIN = _BLOCKS | {"block_out_channels": (8, 8), "latent_channels": 4}
_VIDEO = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1,
          "norm_num_groups": 4}  # fmt: skip
_WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
_CHANNELS = {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [0.5, 2.0, 1.0, 3.0]}

# Arguments of each class, and pictures (H, W) or clips (T, H, W) that it takes
TINY: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "AsymmetricAutoencoderKL": (
        _BLOCKS | {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)}, (16, 24),
    ),
    "AutoencoderDC": (
        {"latent_channels": 4, "attention_head_dim": 8,
         "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
         "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
         "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
         "scaling_factor": 0.5}, (16, 24),
    ),
    "AutoencoderKL": (_PLAIN | {"scaling_factor": 0.5} | _CHANNELS, (16, 24)),
    "AutoencoderKLCogVideoX": (_VIDEO, (9, 16, 24)),
    "AutoencoderKLFlux2": (_PLAIN, (16, 24)),
    "AutoencoderKLHunyuanImage": (
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 32,
         "block_out_channels": (32, 32), "layers_per_block": 1, "spatial_compression_ratio": 2,
         "scaling_factor": 0.75}, (16, 24),
    ),
    "AutoencoderKLHunyuanImageRefiner": (
        {"latent_channels": 4, "block_out_channels": (32,) * 5, "layers_per_block": 1},
        (5, 32, 48),
    ),
    "AutoencoderKLHunyuanVideo": (_VIDEO, (5, 16, 24)),
    "AutoencoderKLHunyuanVideo15": (
        {"latent_channels": 4, "block_out_channels": (32,) * 5, "layers_per_block": 1},
        (5, 32, 48),
    ),
    "AutoencoderKLKVAE": (
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4,
         "ch_mult": (1, 1)}, (16, 24),
    ),
    "AutoencoderKLKVAEVideo": (
        {"ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1, "z_channels": 4}, (5, 16, 24),
    ),
    "AutoencoderKLLTX2Video": (
        {"latent_channels": 4, "block_out_channels": (8,) * 4,
         "decoder_block_out_channels": (8, 16, 32), "layers_per_block": (1,) * 5,
         "decoder_layers_per_block": (1,) * 4, "spatial_compression_ratio": 32,
         "temporal_compression_ratio": 8}, (9, 64, 96),
    ),
    "AutoencoderKLLTXVideo": (
        {"latent_channels": 4, "block_out_channels": (8,) * 4,
         "decoder_block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5,
         "decoder_layers_per_block": (1,) * 5, "scaling_factor": 0.5}, (9, 64, 96),
    ),
    "AutoencoderKLMagvit": (_VIDEO | {"block_out_channels": [8] * 4}, (5, 16, 24)),
    "AutoencoderKLMiniMaxH3": (
        {"latent_channels": 4, "block_out_channels": (8, 8, 8),
         "spatial_downsample_factors": (2, 2, 1), "temporal_downsample_factors": (2, 2, 1),
         "norm_num_groups": 4, "layers_per_block": 1, "decoder_num_layers": 1,
         "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16} | _CHANNELS,
        (17, 16, 24),
    ),
    "AutoencoderKLMochi": (
        {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
         "latent_channels": 4, "layers_per_block": (1,) * 5} | _CHANNELS, (7, 16, 24),
    ),
    "AutoencoderKLQwenImage": (_WAN | _CHANNELS, (16, 24)),
    "AutoencoderKLQwenImage21": (
        _WAN | {"decoder_base_dim": 4, "dim_mult": [1] * 5}
        | _CHANNELS, (16, 32),
    ),
    "AutoencoderKLWan": (_WAN | _CHANNELS, (5, 16, 24)),
    "AutoencoderKLCosmos": (
        {"encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8),
         "latent_channels": 4, "resolution": 32, "num_layers": 1, "attention_resolutions": (4,)}
        | _CHANNELS, (9, 32, 32),
    ),
    "AutoencoderRAE": (
        {"encoder_type": "mae", "encoder_hidden_size": 64, "encoder_patch_size": 4,
         "encoder_num_hidden_layers": 1, "decoder_hidden_size": 16,
         "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
         "decoder_intermediate_size": 16, "patch_size": 8, "encoder_input_size": 16,
         "latents_mean": [[[0.5] * 4] * 4] * 64, "latents_std": [[[2.0] * 4] * 4] * 64,
         "scaling_factor": 0.5}, (32, 32),
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
         "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "scaling_factor": 0.5,
         "shift_factor": 0.25}, (16, 24),
    ),
    "AutoencoderVidTok": (
        {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}, (17, 16, 24),
    ),
    "ConsistencyDecoderVAE": (
        {"encoder_block_out_channels": (8, 8), "encoder_layers_per_block": 1,
         "encoder_down_block_types": (_DOWN,) * 2, "encoder_norm_num_groups": 4,
         "decoder_block_out_channels": (8, 8), "decoder_layers_per_block": 1,
         "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
         "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2, "decoder_norm_num_groups": 4},
        (16, 24),
    ),
    "Kandinsky6SRVAE": (
        {"latent_channels": 4, "encoder_block_out_channels": (16,) * 5,
         "decoder_block_out_channels": (16,) * 5, "layers_per_block": 1}, (5, 32, 48),
    ),
    "VQModel": (_PLAIN, (16, 24)),
    "AutoencoderKLAllegro": (_VIDEO, (5, 16, 24)),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32, 32), "down_block_types": (_DOWN,) * 2}, (16, 24),
    ),
}  # fmt: skip


def tiny_autoencoder(name: str) -> Any:
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, name)(**TINY[name][0]).eval()
