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
