"""Tiny random models of many architectures, each as its own library makes and saves it."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
import transformers as t

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
VISION = {**BERT, "image_size": 16, "patch_size": 4}
SPEECH = {
    **BERT,
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
}
TEXT = {**BERT, "vocab_size": 64, "max_position_embeddings": 20}


def causal(config: type, **more: object) -> torch.nn.Module:
    return t.AutoModelForCausalLM.from_config(config(**{**SIZES, **more}))


def deepseek_v3() -> torch.nn.Module:
    return causal(
        t.DeepseekV3Config,
        n_routed_experts=4,
        n_shared_experts=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


def dbrx() -> torch.nn.Module:
    config = t.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    config.attn_config.rope_theta = 1e4  # which transformers 5.24 looks for and does not set
    return t.AutoModelForCausalLM.from_config(config)


def jamba() -> torch.nn.Module:
    return causal(
        t.JambaConfig,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    )


def qwen2_vl() -> torch.nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    config = t.Qwen2VLConfig(text_config={**SIZES, "rope_parameters": rope}, vision_config=vision)
    return t.Qwen2VLForConditionalGeneration(config)


def qwen3_vl_moe() -> torch.nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SIZES, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    config = t.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return t.Qwen3VLMoeForConditionalGeneration(config)


def llava() -> torch.nn.Module:
    vision = t.CLIPVisionConfig(**VISION, projection_dim=16)
    config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**SIZES), image_token_index=63)
    return t.LlavaForConditionalGeneration(config)


def falcon_h1() -> torch.nn.Module:
    return causal(
        t.FalconH1Config,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        head_dim=8,
    )


def qwen3_next() -> torch.nn.Module:
    return causal(
        t.Qwen3NextConfig,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )


def segformer() -> torch.nn.Module:
    config = t.SegformerConfig(
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        num_attention_heads=[1, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    return t.SegformerForSemanticSegmentation(config)


def perceiver() -> torch.nn.Module:
    config = t.PerceiverConfig(
        num_latents=8,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=20,
        qk_channels=16,
        v_channels=16,
    )
    return t.PerceiverForMaskedLM(config)


def deberta() -> torch.nn.Module:
    config = t.DebertaV2Config(
        **BERT,
        vocab_size=64,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
    )
    return t.DebertaV2ForMaskedLM(config)


def transformer_2d(cls: type, **more: object) -> torch.nn.Module:
    return cls(num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=4, **more)


def unet() -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def autoencoder() -> torch.nn.Module:
    return diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)


def stable_diffusion() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=t.CLIPTextModel(t.CLIPTextConfig(**TEXT)),
        tokenizer=None,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def vits() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24, "flow_size": 16}
    layers = ("prior_encoder_num_flows", "duration_predictor_num_flows")
    layers += ("posterior_encoder_num_wavenet_layers", "prior_encoder_num_wavenet_layers")
    decoder = {"upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
    blocks = {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]]}
    config = t.VitsConfig(vocab_size=20, spectrogram_bins=9, **sizes, **dict.fromkeys(layers, 1), **decoder, **blocks)
    return t.VitsModel(config)


def sam() -> torch.nn.Module:
    pictures = {**VISION, "image_size": 32, "patch_size": 8, "output_channels": 16, "mlp_dim": 48}
    pictures.pop("intermediate_size")
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 8}
    masks = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    pictures["global_attn_indexes"] = [1]
    return t.SamModel(t.SamConfig(vision_config=pictures, prompt_encoder_config=prompts, mask_decoder_config=masks))


ZOO: dict[str, Callable[[], torch.nn.Module]] = {
    # decoders
    "llama": lambda: causal(t.LlamaConfig),
    "llama, tied": lambda: causal(t.LlamaConfig, tie_word_embeddings=True),
    "mistral": lambda: causal(t.MistralConfig),
    "qwen2": lambda: causal(t.Qwen2Config),
    "qwen3": lambda: causal(t.Qwen3Config, head_dim=8),
    "gemma2": lambda: causal(t.Gemma2Config, head_dim=8),
    "gemma3": lambda: causal(t.Gemma3TextConfig, head_dim=8),
    "phi3": lambda: causal(t.Phi3Config, pad_token_id=0),
    "olmo2": lambda: causal(t.Olmo2Config),
    "stablelm": lambda: causal(t.StableLmConfig),
    "starcoder2": lambda: causal(t.Starcoder2Config),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT, n_positions=64)),
    "gpt_neox": lambda: causal(t.GPTNeoXConfig),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**HIDDEN, num_attention_heads=4)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**HIDDEN, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32)),
    "mpt": lambda: t.MptForCausalLM(t.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=64)),
    # experts: 2-D each, fused, transposed, stacked
    "mixtral": lambda: causal(t.MixtralConfig, num_local_experts=4),
    "qwen2_moe": lambda: causal(
        t.Qwen2MoeConfig, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": lambda: causal(t.Qwen3MoeConfig, num_experts=4, moe_intermediate_size=16, head_dim=8),
    "olmoe": lambda: causal(t.OlmoeConfig, num_experts=4),
    "deepseek_v3": deepseek_v3,
    "granitemoe": lambda: causal(t.GraniteMoeConfig, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: causal(t.GptOssConfig, num_local_experts=4, head_dim=8, layer_types=None),
    "llama4": lambda: causal(
        t.Llama4TextConfig, num_local_experts=4, head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=1
    ),
    "dbrx": dbrx,
    # state-space models
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**HIDDEN, state_size=8)),
    "mamba2": lambda: t.Mamba2ForCausalLM(t.Mamba2Config(**HIDDEN, state_size=8, num_heads=8, head_dim=8, n_groups=2)),
    "jamba": jamba,
    "rwkv": lambda: t.RwkvForCausalLM(t.RwkvConfig(**HIDDEN, attention_hidden_size=32, intermediate_size=48)),
    # encoders, and encoders with decoders
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**BERT, vocab_size=64)),
    "deberta_v2": deberta,
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    ),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
    "whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(**SEQ2SEQ, **TOKENS, num_mel_bins=20, max_source_positions=50, max_target_positions=40)
    ),
    "hubert": lambda: t.HubertModel(t.HubertConfig(**SPEECH)),
    # pictures, and pictures with text
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=5)),
    "swin": lambda: t.SwinForImageClassification(
        t.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    ),
    "convnext": lambda: t.ConvNextForImageClassification(
        t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ),
    "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)),
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    # diffusion
    "dit": lambda: transformer_2d(diffusers.DiTTransformer2DModel, num_embeds_ada_norm=10, sample_size=8),
    "pixart": lambda: transformer_2d(
        diffusers.PixArtTransformer2DModel, cross_attention_dim=16, caption_channels=16, sample_size=8
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ),
    "autoencoder_kl": autoencoder,
    # chosen after the tables of kinds.py were written; one name in them was learnt from these: DINOv2's mask_token
    "cohere2": lambda: causal(t.Cohere2Config),
    "nemotron": lambda: causal(t.NemotronConfig, head_dim=8),
    "recurrent_gemma": lambda: causal(t.RecurrentGemmaConfig, lru_width=128, block_types=["recurrent", "attention"]),
    "lfm2": lambda: causal(t.Lfm2Config, layer_types=["conv", "full_attention"]),
    "falcon_h1": falcon_h1,
    "qwen3_next": qwen3_next,
    "electra": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**BERT, vocab_size=64, embedding_size=16)),
    "esm": lambda: t.EsmForMaskedLM(t.EsmConfig(**BERT, vocab_size=33, pad_token_id=1, mask_token_id=2)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**VISION)),
    "siglip_vision": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
    "segformer": segformer,
    "wav2vec2": lambda: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SPEECH, vocab_size=30)),
    "perceiver": perceiver,
}
NOT_IN_PEFT: dict[
    str, Callable[[], torch.nn.Module]
] = {  # it has no factors for transposed convolutions, nor for heads apart
    "xlnet": lambda: t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=64, d_model=64, n_layer=2, n_head=2, d_inner=48)),
    "vits": vits,
    "sam": sam,
}

FUSED: dict[str, Callable[[], torch.nn.Module]] = {  # models with fused projections
    **{
        name: ZOO[name]
        for name in (
            *("phi3", "gpt2", "gpt_neox", "falcon", "bloom", "mpt", "granitemoe", "gpt_oss", "llama4", "dbrx", "mamba"),
            *("mamba2", "jamba", "qwen2_vl", "lfm2", "qwen3_next", "llama"),
        )
    },
    "falcon, new": lambda: t.FalconForCausalLM(
        t.FalconConfig(**HIDDEN, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True)
    ),
    "falcon, by head": lambda: t.FalconForCausalLM(t.FalconConfig(**HIDDEN, num_attention_heads=4, multi_query=False)),
    "gpt2, across": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT, n_positions=64, add_cross_attention=True)),
    "openai-gpt": lambda: t.OpenAIGPTLMHeadModel(t.OpenAIGPTConfig(**GPT, n_positions=64)),
    "imagegpt": lambda: t.ImageGPTModel(t.ImageGPTConfig(**GPT, n_positions=64)),
    "gpt_bigcode": lambda: t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**GPT, n_positions=64)),
    "gpt_bigcode, by head": lambda: t.GPTBigCodeForCausalLM(
        t.GPTBigCodeConfig(**GPT, n_positions=64, multi_query=False)
    ),
    "gpt_neox_japanese": lambda: causal(t.GPTNeoXJapaneseConfig),
    "persimmon": lambda: causal(t.PersimmonConfig),
    "codegen": lambda: t.CodeGenForCausalLM(t.CodeGenConfig(**GPT, n_positions=64, rotary_dim=4)),
    "minimax": lambda: causal(
        t.MiniMaxConfig, num_local_experts=4, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
    "glm4": lambda: causal(t.Glm4Config, head_dim=8, pad_token_id=0),
    "modernbert": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**SIZES, pad_token_id=0)),
    "deberta": lambda: t.DebertaForMaskedLM(t.DebertaConfig(**BERT, vocab_size=64)),
    "falcon_mamba": lambda: t.FalconMambaForCausalLM(t.FalconMambaConfig(**HIDDEN, state_size=8)),
    "granitemoeshared": lambda: causal(
        t.GraniteMoeSharedConfig, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24
    ),
    "gte": lambda: t.GteModel(t.GteConfig(**BERT, vocab_size=64)),
    "blip": lambda: t.BlipVisionModel(t.BlipVisionConfig(**VISION)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**VISION, use_swiglu_ffn=True)),
    "qwen3_5": lambda: causal(
        t.Qwen3_5TextConfig,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "aria": lambda: causal(t.AriaTextConfig, moe_num_experts=4, moe_topk=2, head_dim=8, pad_token_id=0),
    "qwen3_vl_moe": qwen3_vl_moe,
    "unet": unet,
}
