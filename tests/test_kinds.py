"""What a tensor is, from its name and shape: the rows of the table in docs/checkpoints.md."""

from __future__ import annotations

import pytest

from lox_stream.kinds import kind_of, stack_of

DBRX = {"ffn_config": {"moe_num_experts": 16}}
MATRICES = [  # name, shape, config, (count, m, n)
    ("model.layers.0.self_attn.q_proj.weight", (4096, 4096), {}, (1, 4096, 4096)),
    ("score.weight", (1, 4096), {}, (1, 1, 4096)),
    ("model.layers.3.block_sparse_moe.input_linear.weight", (32, 1024, 1536), {}, (32, 1024, 1536)),
    ("experts.small", (4, 40, 30), {}, (4, 40, 30)),
    ("model.layers.3.mlp.experts.gate_up_proj", (32, 2880, 5760), {}, (32, 2880, 5760)),
    ("transformer.blocks.0.ffn.experts.mlp.v1", (16 * 10752, 6144), DBRX, (16, 10752, 6144)),
    ("transformer.blocks.0.ffn.experts.mlp.w2", (16 * 10752, 6144), DBRX, (16, 10752, 6144)),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (16 * 10752, 6144), {}, (1, 16 * 10752, 6144)),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (17, 6144), DBRX, (1, 17, 6144)),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (32, 6), {"ffn_config": {"moe_num_experts": True}}, (1, 32, 6)),
    ("transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight", (8192, 6144), DBRX, (1, 8192, 6144)),
    ("model.encoder.conv1.weight", (1280, 128, 3), {}, (1, 1280, 384)),
    ("encoder.pos_conv_embed.conv.weight", (1024, 64, 128), {}, (1, 1024, 8192)),
    ("any.name.at.all", (512, 256, 5), {}, (1, 512, 1280)),
    ("vit.embeddings.patch_embeddings.projection.weight", (768, 3, 16, 16), {}, (1, 768, 768)),
    ("visual.patch_embed.proj.weight", (1280, 3, 2, 14, 14), {}, (1, 1280, 1176)),
    ("vit.embeddings.position_embeddings", (1, 197, 768), {}, (1, 197, 768)),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 12), {}, (1, 32, 12)),
    ("swin.layers.0.blocks.0.attention.self.relative_position_bias_table", (169, 4), {}, (1, 169, 4)),
    ("transformer.h.0.attn.c_attn.weight", (768, 2304), {}, (1, 768, 2304)),
    ("model.embed_tokens", (32000, 4096), {}, (1, 32000, 4096)),
    ("rows_tokens", (100, 48), {}, (1, 100, 48)),
    ("decoder.conv_post.weight", (1, 32, 7), {}, (1, 1, 224)),
    ("conv_embed.pos_embed", (1, 196, 768), {}, (1, 196, 768)),
    ("transformer.layer.0.rel_attn.q", (32, 1, 32), {}, (1, 32, 32)),
    ("latents", (1, 16, 8), {}, (1, 16, 8)),
    ("transformer.layer.0.rel_attn.q", (1024, 16, 64), {}, (1, 1024, 1024)),
    ("transformer.layer.0.rel_attn.o", (1024, 16, 64), {}, (1, 1024, 1024)),
    ("transformer.layer.0.rel_attn.seg_embed", (2, 16, 64), {}, (1, 2, 1024)),
    ("vision_encoder.pos_embed", (1, 64, 64, 1280), {}, (1, 4096, 1280)),
    ("vision_encoder.pos_embed", (1, 48, 64, 1280), {}, (1, 3072, 1280)),
    ("backbone.pos_embed", (1, 96, 7, 7), {}, (1, 96, 49)),
    ("text.position_embedding", (1, 1, 77, 512), {}, (1, 77, 512)),
    ("layers.experts.up", (4, 8, 64, 96), {}, (1, 4, 8 * 64 * 96)),
    ("mamba.x_proj.weight", (160, 5120), {}, (1, 160, 5120)),
    ("backbone.layers.0.mixer.dt_proj.weight", (5120, 160), {}, (1, 5120, 160)),
]
OTHERS = [
    ("model.norm.weight", (4096,), "vector"),
    ("logit_scale", (), "vector"),
    ("vit.embeddings.cls_token", (1, 1, 768), "vector"),
    ("rwkv.blocks.0.attention.time_mix_key", (1, 1, 2048), "vector"),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original0", (1, 1, 128), "vector"),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", (1024, 64, 128), "elementwise"),
    ("encoder.pos_conv_embed.conv.weight_v", (1024, 64, 128), "elementwise"),
    ("model.layers.0.mlp.experts.gate_up_proj_bias", (32, 5760), "bias"),
    ("final_logits_bias", (1, 50265), "bias"),
    ("transformer.h.0.attn.bias", (1, 1, 1024, 1024), "bias"),
    ("embeddings.mask_token", (1, 768), "elementwise"),
    ("embeddings.register_tokens", (1, 4, 768), "elementwise"),
    ("duration_predictor.flows.0.translate", (2, 1), "elementwise"),
    ("query_tokens", (1, 32, 768), "elementwise"),
    ("embeddings.detection_tokens", (1, 100, 192), "elementwise"),
    ("backbone.layers.0.mixer.dt_bias", (80,), "vector"),
    ("transformer.layer.0.rel_attn.r_w_bias", (16, 64), "bias"),
    ("backbone.layers.0.mixer.A_log", (5120, 16), "elementwise"),
    ("transformer_blocks.0.scale_shift_table", (6, 1152), "elementwise"),
    ("backbone.layers.0.mixer.conv1d.weight", (5120, 1, 4), "depthwise"),
    ("convnext.encoder.stages.0.layers.0.dwconv.weight", (96, 1, 7, 7), "depthwise"),
    ("feature_extractor.conv_layers.0.conv.weight", (512, 1, 10), "depthwise"),
]


@pytest.mark.parametrize(("name", "shape", "config", "stack"), MATRICES)
def test_a_tensor_holds_the_matrices_that_its_model_multiplies_with(name, shape, config, stack):
    assert kind_of(name, shape) == "matrix"
    assert stack_of(name, shape, config) == stack


@pytest.mark.parametrize(("name", "shape", "kind"), OTHERS)
def test_what_multiplies_no_vector_is_no_matrix(name, shape, kind):
    assert kind_of(name, shape) == kind
