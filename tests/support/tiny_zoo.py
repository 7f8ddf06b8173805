"""One tiny random model of every architecture that is supported, and of some that are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from tests.support.tiny import VOCAB_SIZE, tiny_tokenizer

KindTask = Literal[
    "causal", "multimodal", "seq2seq", "masked", "embedding", "image", "speech", "ctc", "towers", "vision"
]
HIDDEN, HEADS, INNER, POSITIONS = 64, 4, 128, 512
IMAGE_SIZE, PATCH_SIZE, CHANNELS, CLASSES, IMAGE_TOKEN = 32, 8, 3, 10, 120
BANDS, FRAMES, SAMPLES = 32, 100, 9600


@dataclass(frozen=True)
class Kind:
    """One architecture in a tiny size.

    Args:
        name: Short name.
        config: Name of the config class in transformers.
        model: Name of the model class in transformers.
        task: What the model computes, hence what its rows are.
        settings: Arguments of the config, beside those that all share.
        rows: Calibration rows; experts need more, because each sees a part of the tokens only.
        seed: Seed of the weights. Those of experts are such that the router sends each at least 64 tokens, one per
            column, so that no expert's statistics need other tokens.
        supported: Whether hawqtool quantizes it.
        reason: For refused ones, a pattern that the error must match.
        loads: Whether transformers with compressed-tensors loads the packed folder. It drops Conv1D layers without
            a word, and cannot build packed Falcon layers.
        stacked: Whether its experts are stored in one tensor per layer.
    """

    name: str
    config: str
    model: str
    task: KindTask = "causal"
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 6
    seed: int = 0
    supported: bool = True
    reason: str = ""
    loads: bool = True
    stacked: bool = False

    @property
    def auto_class(self) -> Any:
        """The class through which users load such a checkpoint."""
        names = {
            "causal": "AutoModelForCausalLM",
            "multimodal": "AutoModelForMultimodalLM",
            "seq2seq": "AutoModelForSeq2SeqLM",
            "masked": "AutoModelForMaskedLM",
            "embedding": "AutoModel",
            "image": "AutoModelForImageClassification",
            "speech": "AutoModelForSpeechSeq2Seq",
            "ctc": "AutoModelForCTC",
            "towers": "AutoModel",
            "vision": "AutoModelForMultimodalLM",
        }
        return getattr(transformers, names[self.task])


_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_TOWER = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "initializer_range": 0.08,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_EXPERTS = _GROUPED | {"head_dim": 16, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": HIDDEN,
    "n_inner": INNER,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_OPT = {k: v for k, v in _TEXT.items() if k != "intermediate_size"} | {"ffn_dim": INNER, "pad_token_id": 1}
_FALCON = _TEXT | {"alibi": False, "bias": True, "num_kv_heads": 2}
_BERT = _TEXT | {"pad_token_id": 0, "tie_word_embeddings": True}
_GEMMA = _GROUPED | {"head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True, "pad_token_id": 2}
_VIT = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "num_channels": CHANNELS,
    "num_labels": CLASSES,
    "initializer_range": 0.08,
}
_VISION_TOWER = {k: v for k, v in _VIT.items() if k not in ("num_labels", "initializer_range")}

ZOO: tuple[Kind, ...] = (
    Kind("llama", "LlamaConfig", "LlamaForCausalLM", settings=_GROUPED | {"attention_bias": True, "mlp_bias": True}),
    Kind("qwen2", "Qwen2Config", "Qwen2ForCausalLM", settings=_GROUPED),
    Kind("qwen3", "Qwen3Config", "Qwen3ForCausalLM", settings=_GROUPED | {"head_dim": 16}),
    Kind("mistral", "MistralConfig", "MistralForCausalLM", settings=_GROUPED),
    Kind("gemma2", "Gemma2Config", "Gemma2ForCausalLM", settings=_GEMMA | {"query_pre_attn_scalar": 16}),
    Kind(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        settings=_GEMMA
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    Kind("phi", "PhiConfig", "PhiForCausalLM", settings=_TEXT | {"qk_layernorm": True}),
    Kind("phi3", "Phi3Config", "Phi3ForCausalLM", settings=_GROUPED),
    Kind("opt-pre", "OPTConfig", "OPTForCausalLM", settings=_OPT),
    Kind(
        "opt-post",
        "OPTConfig",
        "OPTForCausalLM",
        settings=_OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
    Kind("neox-parallel", "GPTNeoXConfig", "GPTNeoXForCausalLM", settings=_TEXT | {"use_parallel_residual": True}),
    Kind("neox-serial", "GPTNeoXConfig", "GPTNeoXForCausalLM", settings=_TEXT | {"use_parallel_residual": False}),
    Kind("gptj", "GPTJConfig", "GPTJForCausalLM", settings=_GPT2 | {"rotary_dim": 8}),
    Kind(
        "cohere",
        "CohereConfig",
        "CohereForCausalLM",
        settings=_GROUPED | {"tie_word_embeddings": True, "use_qk_norm": True},
    ),
    Kind(
        "falcon-new",
        "FalconConfig",
        "FalconForCausalLM",
        settings=_FALCON | {"new_decoder_architecture": True},
        loads=False,
    ),
    Kind(
        "falcon-old",
        "FalconConfig",
        "FalconForCausalLM",
        settings=_FALCON | {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True},
        loads=False,
    ),
    Kind("gpt2", "GPT2Config", "GPT2LMHeadModel", settings=_GPT2, loads=False),
    Kind(
        "mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        settings=_GROUPED | {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        rows=12,
        seed=6,
    ),
    Kind(
        "qwen3-moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        settings=_EXPERTS | {"num_hidden_layers": 3, "num_experts": 8, "mlp_only_layers": [1]},
        rows=16,
        seed=14,
    ),
    Kind(
        "qwen2-moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        settings=_EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 96},
        rows=24,
        seed=1,
    ),
    Kind(
        "olmoe",
        "OlmoeConfig",
        "OlmoeForCausalLM",
        settings=_GROUPED | {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
        rows=24,
        seed=11,
    ),
    Kind(
        "llama4",
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        settings=_GROUPED
        | {
            "head_dim": 16,
            "intermediate_size": 64,
            "intermediate_size_mlp": 96,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
        },
        rows=16,
        seed=2,
        stacked=True,
    ),
    Kind(
        "granite-moe",
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        settings=_GROUPED
        | {
            "intermediate_size": 64,
            "shared_intermediate_size": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["attention", "attention"],
        },
        rows=12,
        seed=2,
        loads=False,
        stacked=True,
    ),
    Kind(
        "gemma3-images",
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        "multimodal",
        settings={
            "text_config": _GEMMA,
            "vision_config": _VISION_TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": 120,
            "boi_token_index": 121,
            "eoi_token_index": 122,
        },
    ),
    Kind(
        "qwen2-vl",
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        "multimodal",
        settings={
            "text_config": _GROUPED | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": HIDDEN,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": PATCH_SIZE,
            },
            "image_token_id": 120,
            "video_token_id": 121,
            "vision_start_token_id": 122,
            "vision_end_token_id": 123,
        },
    ),
    Kind("bert", "BertConfig", "BertModel", "embedding", _BERT),
    Kind("bert-masked", "BertConfig", "BertForMaskedLM", "masked", _BERT),
    Kind("roberta", "RobertaConfig", "RobertaForMaskedLM", "masked", _BERT | {"pad_token_id": 1}),
    Kind(
        "distilbert",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        "masked",
        {
            "vocab_size": VOCAB_SIZE,
            "dim": HIDDEN,
            "hidden_dim": INNER,
            "n_layers": 2,
            "n_heads": HEADS,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.08,
        },
    ),
    Kind("vit", "ViTConfig", "ViTForImageClassification", "image", _VIT, rows=12),
    Kind(
        "swin",
        "SwinConfig",
        "SwinForImageClassification",
        "image",
        {
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": CLASSES,
            "initializer_range": 0.08,
        },
        rows=12,
    ),
    Kind(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        "seq2seq",
        settings={
            "vocab_size": VOCAB_SIZE,
            "d_model": HIDDEN,
            "d_ff": INNER,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        loads=False,
    ),
    Kind(
        "gemma4-shared",
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        settings=_GROUPED
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 8,
            "hidden_size_per_layer_input": HIDDEN,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
    ),
    Kind(
        "gemma3n",
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        settings=_GROUPED
        | {
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "head_dim": 16,
            "sliding_window": 8,
            "laurel_rank": 32,
            "activation_sparsity_pattern": [0.0, 0.0],
            "hidden_size_per_layer_input": HIDDEN,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
    ),
    Kind(
        "whisper",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        "speech",
        seed=1,
        settings={
            "vocab_size": VOCAB_SIZE,
            "num_mel_bins": BANDS,
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 64,
            "init_std": 0.08,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    Kind(
        "wav2vec2",
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        "ctc",
        settings={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "initializer_range": 0.08,
            "conv_dim": (32, 32),
            "conv_stride": (20, 16),
            "conv_kernel": (20, 16),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    Kind(
        "clip",
        "CLIPConfig",
        "CLIPModel",
        "towers",
        settings={
            "text_config": _TOWER
            | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 32, "eos_token_id": 1, "bos_token_id": 0},
            "vision_config": _TOWER | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
            "projection_dim": 48,
        },
    ),
    Kind(
        "gpt-oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        settings=_GROUPED
        | {
            "head_dim": 16,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
        stacked=True,
    ),
    Kind(
        "nemotron-h",
        "NemotronHConfig",
        "NemotronHForCausalLM",
        settings={k: v for k, v in _GROUPED.items() if k != "num_hidden_layers"}
        | {
            "layers_block_type": ["mamba", "moe", "attention"],
            "head_dim": 16,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
            "num_experts_per_tok": 2,
            "pad_token_id": 0,
        },
        rows=12,
    ),
    Kind(
        "deepseek-v4",
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        settings={k: v for k, v in _TEXT.items() if k != "intermediate_size"}
        | {
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
            "mlp_layer_types": ["moe", "moe"],
            "num_key_value_heads": 1,
            "head_dim": 32,
            "partial_rotary_factor": 0.5,
            "sliding_window": 8,
            "q_lora_rank": 32,
            "o_groups": 2,
            "o_lora_rank": 32,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "swiglu_limit": 0.5,
        },
        rows=8,
    ),
    Kind(
        "glm-dsa",
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        settings=_TEXT
        | {
            "num_key_value_heads": HEADS,
            "head_dim": 8,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 8,
            "indexer_types": ["full", "shared"],
            "mlp_layer_types": ["dense", "dense"],
        },
    ),
    Kind(
        "ernie-vl",
        "Ernie4_5_VLMoeConfig",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "multimodal",
        settings={
            "text_config": _GROUPED
            | {
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
                "mlp_layer_types": ["dense", "sparse"],
                "moe_intermediate_size": [64, 64],
                "moe_k": 2,
                "moe_num_experts": 4,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 64,
                "patch_size": PATCH_SIZE,
            },
            "image_token_id": 120,
            "image_start_token_id": 121,
            "image_end_token_id": 122,
            "video_token_id": 123,
            "video_start_token_id": 124,
            "video_end_token_id": 125,
        },
        loads=False,
    ),
    Kind(
        "modernbert",
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        "masked",
        settings=_BERT | {"cls_token_id": 0, "sep_token_id": 1},
        supported=False,
        reason="transformers cannot load this model when it is packed: its own initialization",
    ),
)
"""Every kind, in the order of the table."""

VISION = Kind(
    "llava-vision",
    "LlavaConfig",
    "LlavaForConditionalGeneration",
    "vision",
    settings={
        "text_config": _GROUPED | {"model_type": "llama"},
        "vision_config": _TOWER
        | {"model_type": "clip_vision_model", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    },
)
"""A wrapper whose tower is quantized beside its language model."""

SUPPORTED = tuple(kind for kind in ZOO if kind.supported)
REFUSED = tuple(kind for kind in ZOO if not kind.supported)


def kind_named(name: str) -> Kind:
    """The kind of that name."""
    return next(kind for kind in ZOO if kind.name == name)


def save_kind(kind: Kind, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a seeded random model of a kind as safetensors, with a tokenizer or an image processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(kind.seed)
        config = getattr(transformers, kind.config)(**kind.settings)
        model = getattr(transformers, kind.model)(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                _perturb(parameter)
    model.save_pretrained(folder)
    if kind.task in ("image", "towers", "vision"):
        image_processor().save_pretrained(folder)
    if kind.task in ("speech", "ctc"):
        sound_extractor(kind).save_pretrained(folder)
    if kind.task not in ("image", "ctc"):
        tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def _perturb(parameter: Tensor) -> None:
    """Norm gains, biases and some embeddings start as constants; random ones make a forgotten tensor visible."""
    if parameter.dim() == 1 or bool((parameter == parameter.flatten()[0]).all()):
        parameter.add_(0.1 * torch.randn_like(parameter))


def image_processor() -> Any:
    """The image processor of the vision kinds."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return transformers.ViTImageProcessor(size=size)


def sound_extractor(kind: Kind) -> Any:
    """The feature extractor of a kind that takes sounds: a second of them, or as many samples as there are."""
    if kind.task == "ctc":
        return transformers.Wav2Vec2FeatureExtractor()
    return transformers.WhisperFeatureExtractor(feature_size=BANDS, chunk_length=FRAMES // 100)


def value_shape(kind: Kind) -> tuple[int, ...]:
    """Shape of a row's image or sound; empty where a kind takes tokens alone."""
    image = (CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    shapes = dict.fromkeys(("image", "towers", "vision"), image) | {"speech": (BANDS, FRAMES), "ctc": (SAMPLES,)}
    return shapes.get(kind.task, ())


def calibration_inputs(kind: Kind, seed: int = 4) -> Tensor:
    """``[rows, 32]`` token ids, ``[rows, ...]`` pixels or sounds, or both, a 32nd of the numbers behind each token."""
    generator = torch.Generator().manual_seed(seed)
    shape = value_shape(kind)
    # No numbers are drawn for texts: codes of some kinds lie on ties for other tokens than these.
    values = torch.randn(kind.rows, *shape, generator=generator) if shape else torch.empty(0)
    if kind.task in ("image", "ctc"):
        return values
    tokens = torch.randint(3, VOCAB_SIZE, (kind.rows, 32), generator=generator)
    if kind.task == "vision":
        tokens.clamp_(max=IMAGE_TOKEN - 1)
        tokens[:, : (IMAGE_SIZE // PATCH_SIZE) ** 2] = IMAGE_TOKEN
    return torch.cat([tokens[..., None], values.reshape(kind.rows, 32, -1)], -1) if shape else tokens
