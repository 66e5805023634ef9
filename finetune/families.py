"""What is known of published bases, as data: a name in; shape, context, template, stop tokens, licence out. No torch.

Shapes are those of the config.json that each publisher ships. Parameter counts follow from them in closed form
(`count_parameters`); tests/test_families.py compares them with transformers' own modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

EVERY_LINEAR = "all-linear"


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts part of a shape."""

    count: int
    active: int  # that a token passes, besides the shared ones
    intermediate: int  # of one expert
    shared_intermediate: int = 0  # of all experts together that every token passes
    every: int = 1  # each so-many-th layer has experts, the others a dense MLP
    dense_first: int = 0  # so many first layers have a dense MLP
    router_bias: bool = False  # DeepSeek V3: one value an expert


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's latent attention: ranks of the latents and sizes of a head (arXiv:2405.04434, section 2.1)."""

    query_rank: int  # 0: the query is not compressed
    key_value_rank: int
    no_rope_size: int
    rope_size: int
    value_size: int


@dataclass(frozen=True)
class Vision:
    """A vision tower, which is neither quantised nor adapted; `kind` is the architecture of its counting."""

    kind: str  # siglip | mllama | llama4
    hidden: int
    intermediate: int
    layers: int
    image: int  # pixels a side
    patch: int = 14


@dataclass(frozen=True)
class Shape:
    """The sizes that decide how many parameters a model has."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int = 0  # 0: hidden / heads
    tied: bool = False  # the head is the embedding
    query_bias: bool = False  # biases of q, k and v (Qwen 2)
    head_norms: bool = False  # norms of query and key heads (Qwen 3, Gemma 3)
    norms_per_layer: int = 2
    experts: Experts | None = None
    latent: LatentAttention | None = None
    cross_layers: int = 0  # layers that attend to the image, besides `layers` (Llama 3.2 vision)
    vision: Vision | None = None

    @property
    def head(self) -> int:
        return self.head_size or self.hidden // self.heads


@dataclass(frozen=True)
class Family:
    """What the models of one release share."""

    name: str
    model_type: str  # of config.json
    context_tokens: int
    template: str  # of ours, or `own`: the one in the chat variant's tokenizer; base variants have none
    stop_tokens: tuple[str, ...]  # of the chat variant, the end of a turn first
    licence: str
    leave_alone: tuple[str, ...] = ()  # modules that are neither quantised nor adapted
    differs: str = ""
    targets: str = EVERY_LINEAR


@dataclass(frozen=True)
class Model:
    """One published size: its hub id, and the context where it is not the family's."""

    family: str
    id: str
    shape: Shape
    context_tokens: int = 0


SENTENCEPIECE = ("</s>",)
LLAMA_3_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")
GEMMA_STOPS = ("<end_of_turn>", "<eos>")
VISION = ("vision_model", "vision_tower", "multi_modal_projector")

FAMILIES = (
    Family("LLaMA", "llama", 2048, "alpaca", SENTENCEPIECE, "llama1", differs="multi-head attention; base models only"),
    Family("Llama 2", "llama", 4096, "llama2", SENTENCEPIECE, "llama2"),
    Family("Code Llama", "llama", 16_384, "llama2", SENTENCEPIECE, "llama2", differs="rope theta 1,000,000"),
    Family("Llama 3", "llama", 8192, "llama3", LLAMA_3_STOPS, "llama3"),
    Family("Llama 3.1", "llama", 131_072, "own", LLAMA_3_STOPS, "llama3.1", differs="rope scaled from 8,192 tokens"),
    Family("Llama 3.2", "llama", 131_072, "own", LLAMA_3_STOPS, "llama3.2", differs="tied; rope scaled from 8,192"),
    Family("Llama 3.2 Vision", "mllama", 131_072, "own", LLAMA_3_STOPS, "llama3.2", VISION, "cross-attention layers"),
    Family("Llama 3.3", "llama", 131_072, "own", LLAMA_3_STOPS, "llama3.3", differs="rope scaled from 8,192 tokens"),
    Family(
        "Llama 4",
        "llama4",
        10_485_760,
        "own",
        ("<|eot|>", "<|eom|>", "<|end_of_text|>"),
        "llama4",
        (*VISION, "router"),
        "experts are 3-D tensors; every fourth layer has no rope; chunked attention",
    ),
    Family("Alpaca", "llama", 2048, "alpaca", SENTENCEPIECE, "llama1", differs="one more token: [PAD]"),
    Family("Vicuna", "llama", 4096, "vicuna", SENTENCEPIECE, "llama2"),
    Family("OpenLLaMA", "llama", 2048, "alpaca", SENTENCEPIECE, "apache-2.0"),
    Family("TinyLlama", "llama", 2048, "zephyr", SENTENCEPIECE, "apache-2.0"),
    Family("Mistral", "mistral", 32_768, "mistral", SENTENCEPIECE, "apache-2.0", differs="v0.1: a window of 4,096"),
    Family("Mixtral", "mixtral", 32_768, "mistral", SENTENCEPIECE, "apache-2.0", ("gate",), "8 experts, 2 active"),
    Family("Qwen 2.5", "qwen2", 32_768, "chatml", CHATML_STOPS, "apache-2.0", differs="biases on q, k and v"),
    Family("Qwen 3", "qwen3", 40_960, "own", CHATML_STOPS, "apache-2.0", differs="norms on query and key heads"),
    Family("Qwen 3 MoE", "qwen3_moe", 40_960, "own", CHATML_STOPS, "apache-2.0", ("gate",), "128 experts, 8 active"),
    Family("Gemma 2", "gemma2", 8192, "own", GEMMA_STOPS, "gemma", differs="soft caps; every other layer a window"),
    Family("Gemma 3", "gemma3_text", 32_768, "own", GEMMA_STOPS, "gemma", differs="five of six layers a window"),
    Family("Gemma 3 Vision", "gemma3", 131_072, "own", GEMMA_STOPS, "gemma", VISION, "five of six layers a window"),
    Family(
        "DeepSeek V2",
        "deepseek_v2",
        163_840,
        "own",
        ("<｜end▁of▁sentence｜>",),
        "deepseek",
        ("gate",),
        "latent attention",
    ),
    Family(
        "DeepSeek V3", "deepseek_v3", 163_840, "own", ("<｜end▁of▁sentence｜>",), "mit", ("gate",), "latent attention"
    ),
    Family("DeepSeek R1 Distill Qwen", "qwen2", 131_072, "own", ("<｜end▁of▁sentence｜>",), "mit"),
    Family("DeepSeek R1 Distill Llama", "llama", 131_072, "own", ("<｜end▁of▁sentence｜>",), "llama3.1"),
    Family("Phi 3", "phi3", 4096, "own", ("<|end|>", "<|endoftext|>"), "mit", differs="q, k, v and gate, up in one"),
    Family(
        "Phi 4", "phi3", 16_384, "own", ("<|im_end|>", "<|endoftext|>"), "mit", differs="q, k, v and gate, up in one"
    ),
)

L7B = Shape(32_000, 4096, 11_008, 32, 32, 32)
L13B = Shape(32_000, 5120, 13_824, 40, 40, 40)
L8B = Shape(128_256, 4096, 14_336, 32, 32, 8)
L70B = Shape(128_256, 8192, 28_672, 80, 64, 8)
MIXTRAL_8X7B = Shape(32_000, 4096, 14_336, 32, 32, 8, experts=Experts(8, 2, 14_336))
MIXTRAL_8X22B = Shape(32_000, 6144, 16_384, 56, 48, 8, experts=Experts(8, 2, 16_384))
SCOUT_VISION = Vision("llama4", 1408, 5632, 34, 336)
LLAMA_32_VISION = Vision("mllama", 1280, 5120, 32, 560)  # and 8 global layers
L11B_VISION = Shape(128_256, 4096, 14_336, 32, 32, 8, cross_layers=8, vision=LLAMA_32_VISION)
L90B_VISION = Shape(128_256, 8192, 28_672, 80, 64, 8, cross_layers=20, vision=LLAMA_32_VISION)
SCOUT = Shape(
    202_048, 5120, 16_384, 48, 40, 8, 128, experts=Experts(16, 1, 8192, shared_intermediate=8192), vision=SCOUT_VISION
)
MAVERICK = replace(SCOUT, experts=Experts(128, 1, 8192, shared_intermediate=8192, every=2))
SIGLIP = Vision("siglip", 1152, 4304, 27, 896)

MODELS = (
    Model("LLaMA", "huggyllama/llama-7b", L7B),
    Model("LLaMA", "huggyllama/llama-13b", L13B),
    Model("LLaMA", "huggyllama/llama-30b", Shape(32_000, 6656, 17_920, 60, 52, 52)),
    Model("LLaMA", "huggyllama/llama-65b", Shape(32_000, 8192, 22_016, 80, 64, 64)),
    Model("Llama 2", "meta-llama/Llama-2-7b-hf", L7B),
    Model("Llama 2", "meta-llama/Llama-2-7b-chat-hf", L7B),
    Model("Llama 2", "meta-llama/Llama-2-13b-hf", L13B),
    Model("Llama 2", "meta-llama/Llama-2-13b-chat-hf", L13B),
    Model("Llama 2", "meta-llama/Llama-2-70b-hf", Shape(32_000, 8192, 28_672, 80, 64, 8)),
    Model("Llama 2", "meta-llama/Llama-2-70b-chat-hf", Shape(32_000, 8192, 28_672, 80, 64, 8)),
    Model("Code Llama", "codellama/CodeLlama-7b-hf", Shape(32_016, 4096, 11_008, 32, 32, 32)),
    Model("Code Llama", "codellama/CodeLlama-13b-hf", Shape(32_016, 5120, 13_824, 40, 40, 40)),
    Model("Code Llama", "codellama/CodeLlama-34b-hf", Shape(32_000, 8192, 22_016, 48, 64, 8)),
    Model("Code Llama", "codellama/CodeLlama-70b-hf", Shape(32_016, 8192, 28_672, 80, 64, 8)),
    Model("Llama 3", "meta-llama/Meta-Llama-3-8B", L8B),
    Model("Llama 3", "meta-llama/Meta-Llama-3-8B-Instruct", L8B),
    Model("Llama 3", "meta-llama/Meta-Llama-3-70B", L70B),
    Model("Llama 3", "meta-llama/Meta-Llama-3-70B-Instruct", L70B),
    Model("Llama 3.1", "meta-llama/Llama-3.1-8B", L8B),
    Model("Llama 3.1", "meta-llama/Llama-3.1-8B-Instruct", L8B),
    Model("Llama 3.1", "meta-llama/Llama-3.1-70B", L70B),
    Model("Llama 3.1", "meta-llama/Llama-3.1-70B-Instruct", L70B),
    Model("Llama 3.1", "meta-llama/Llama-3.1-405B", Shape(128_256, 16_384, 53_248, 126, 128, 8)),
    Model("Llama 3.1", "meta-llama/Llama-3.1-405B-Instruct", Shape(128_256, 16_384, 53_248, 126, 128, 8)),
    Model("Llama 3.2", "meta-llama/Llama-3.2-1B", Shape(128_256, 2048, 8192, 16, 32, 8, tied=True)),
    Model("Llama 3.2", "meta-llama/Llama-3.2-1B-Instruct", Shape(128_256, 2048, 8192, 16, 32, 8, tied=True)),
    Model("Llama 3.2", "meta-llama/Llama-3.2-3B", Shape(128_256, 3072, 8192, 28, 24, 8, tied=True)),
    Model("Llama 3.2", "meta-llama/Llama-3.2-3B-Instruct", Shape(128_256, 3072, 8192, 28, 24, 8, tied=True)),
    Model("Llama 3.2 Vision", "meta-llama/Llama-3.2-11B-Vision", L11B_VISION),
    Model("Llama 3.2 Vision", "meta-llama/Llama-3.2-11B-Vision-Instruct", L11B_VISION),
    Model("Llama 3.2 Vision", "meta-llama/Llama-3.2-90B-Vision", L90B_VISION),
    Model("Llama 3.2 Vision", "meta-llama/Llama-3.2-90B-Vision-Instruct", L90B_VISION),
    Model("Llama 3.3", "meta-llama/Llama-3.3-70B-Instruct", L70B),
    Model("Llama 4", "meta-llama/Llama-4-Scout-17B-16E", SCOUT, 262_144),
    Model("Llama 4", "meta-llama/Llama-4-Scout-17B-16E-Instruct", SCOUT),
    Model("Llama 4", "meta-llama/Llama-4-Maverick-17B-128E", MAVERICK, 262_144),
    Model("Llama 4", "meta-llama/Llama-4-Maverick-17B-128E-Instruct", MAVERICK, 1_048_576),
    Model("Alpaca", "tatsu-lab/alpaca-7b-wdiff", Shape(32_001, 4096, 11_008, 32, 32, 32)),
    Model("Vicuna", "lmsys/vicuna-7b-v1.5", L7B),
    Model("Vicuna", "lmsys/vicuna-13b-v1.5", L13B),
    Model("OpenLLaMA", "openlm-research/open_llama_3b_v2", Shape(32_000, 3200, 8640, 26, 32, 32)),
    Model("OpenLLaMA", "openlm-research/open_llama_7b_v2", L7B),
    Model("OpenLLaMA", "openlm-research/open_llama_13b", L13B),
    Model("TinyLlama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", Shape(32_000, 2048, 5632, 22, 32, 4)),
    Model("Mistral", "mistralai/Mistral-7B-v0.1", Shape(32_000, 4096, 14_336, 32, 32, 8)),
    Model("Mistral", "mistralai/Mistral-7B-v0.3", Shape(32_768, 4096, 14_336, 32, 32, 8)),
    Model("Mistral", "mistralai/Mistral-7B-Instruct-v0.3", Shape(32_768, 4096, 14_336, 32, 32, 8)),
    Model("Mistral", "mistralai/Mistral-Nemo-Instruct-2407", Shape(131_072, 5120, 14_336, 40, 32, 8, 128), 131_072),
    Model("Mixtral", "mistralai/Mixtral-8x7B-v0.1", MIXTRAL_8X7B),
    Model("Mixtral", "mistralai/Mixtral-8x22B-v0.1", MIXTRAL_8X22B, 65_536),
    Model("Qwen 2.5", "Qwen/Qwen2.5-0.5B", Shape(151_936, 896, 4864, 24, 14, 2, tied=True, query_bias=True)),
    Model("Qwen 2.5", "Qwen/Qwen2.5-1.5B", Shape(151_936, 1536, 8960, 28, 12, 2, tied=True, query_bias=True)),
    Model("Qwen 2.5", "Qwen/Qwen2.5-3B", Shape(151_936, 2048, 11_008, 36, 16, 2, tied=True, query_bias=True)),
    Model("Qwen 2.5", "Qwen/Qwen2.5-7B", Shape(152_064, 3584, 18_944, 28, 28, 4, query_bias=True)),
    Model("Qwen 2.5", "Qwen/Qwen2.5-14B", Shape(152_064, 5120, 13_824, 48, 40, 8, query_bias=True)),
    Model("Qwen 2.5", "Qwen/Qwen2.5-32B", Shape(152_064, 5120, 27_648, 64, 40, 8, query_bias=True)),
    Model("Qwen 2.5", "Qwen/Qwen2.5-72B", Shape(152_064, 8192, 29_568, 80, 64, 8, query_bias=True)),
    Model("Qwen 3", "Qwen/Qwen3-0.6B", Shape(151_936, 1024, 3072, 28, 16, 8, 128, tied=True, head_norms=True)),
    Model("Qwen 3", "Qwen/Qwen3-1.7B", Shape(151_936, 2048, 6144, 28, 16, 8, 128, tied=True, head_norms=True)),
    Model("Qwen 3", "Qwen/Qwen3-4B", Shape(151_936, 2560, 9728, 36, 32, 8, 128, tied=True, head_norms=True)),
    Model("Qwen 3", "Qwen/Qwen3-8B", Shape(151_936, 4096, 12_288, 36, 32, 8, 128, head_norms=True)),
    Model("Qwen 3", "Qwen/Qwen3-14B", Shape(151_936, 5120, 17_408, 40, 40, 8, 128, head_norms=True)),
    Model("Qwen 3", "Qwen/Qwen3-32B", Shape(151_936, 5120, 25_600, 64, 64, 8, 128, head_norms=True)),
    Model(
        "Qwen 3 MoE",
        "Qwen/Qwen3-30B-A3B",
        Shape(151_936, 2048, 6144, 48, 32, 4, 128, head_norms=True, experts=Experts(128, 8, 768)),
    ),
    Model(
        "Qwen 3 MoE",
        "Qwen/Qwen3-235B-A22B",
        Shape(151_936, 4096, 12_288, 94, 64, 4, 128, head_norms=True, experts=Experts(128, 8, 1536)),
    ),
    Model("Gemma 2", "google/gemma-2-2b", Shape(256_000, 2304, 9216, 26, 8, 4, 256, tied=True, norms_per_layer=4)),
    Model("Gemma 2", "google/gemma-2-9b", Shape(256_000, 3584, 14_336, 42, 16, 8, 256, tied=True, norms_per_layer=4)),
    Model("Gemma 2", "google/gemma-2-27b", Shape(256_000, 4608, 36_864, 46, 32, 16, 128, tied=True, norms_per_layer=4)),
    Model(
        "Gemma 3",
        "google/gemma-3-1b-it",
        Shape(262_144, 1152, 6912, 26, 4, 1, 256, tied=True, head_norms=True, norms_per_layer=4),
    ),
    Model(
        "Gemma 3 Vision",
        "google/gemma-3-4b-it",
        Shape(262_208, 2560, 10_240, 34, 8, 4, 256, tied=True, head_norms=True, norms_per_layer=4, vision=SIGLIP),
    ),
    Model(
        "Gemma 3 Vision",
        "google/gemma-3-12b-it",
        Shape(262_208, 3840, 15_360, 48, 16, 8, 256, tied=True, head_norms=True, norms_per_layer=4, vision=SIGLIP),
    ),
    Model(
        "Gemma 3 Vision",
        "google/gemma-3-27b-it",
        Shape(262_208, 5376, 21_504, 62, 32, 16, 128, tied=True, head_norms=True, norms_per_layer=4, vision=SIGLIP),
    ),
    Model(
        "DeepSeek V2",
        "deepseek-ai/DeepSeek-V2-Lite",
        Shape(
            102_400, 2048, 10_944, 27, 16, 16, experts=Experts(64, 6, 1408, shared_intermediate=2816, dense_first=1),
            latent=LatentAttention(0, 512, 128, 64, 128),
        ),
    ),
    Model(
        "DeepSeek V2",
        "deepseek-ai/DeepSeek-V2",
        Shape(
            102_400, 5120, 12_288, 60, 128, 128, experts=Experts(160, 6, 1536, shared_intermediate=3072, dense_first=1),
            latent=LatentAttention(1536, 512, 128, 64, 128),
        ),
    ),
    Model(
        "DeepSeek V3",
        "deepseek-ai/DeepSeek-V3",
        Shape(
            129_280, 7168, 18_432, 61, 128, 128,
            experts=Experts(256, 8, 2048, shared_intermediate=2048, dense_first=3, router_bias=True),
            latent=LatentAttention(1536, 512, 128, 64, 128),
        ),
    ),
    Model(
        "DeepSeek R1 Distill Qwen",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        Shape(151_936, 1536, 8960, 28, 12, 2, query_bias=True),
    ),
    Model(
        "DeepSeek R1 Distill Qwen",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        Shape(152_064, 3584, 18_944, 28, 28, 4, query_bias=True),
    ),
    Model(
        "DeepSeek R1 Distill Qwen",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        Shape(152_064, 5120, 13_824, 48, 40, 8, query_bias=True),
    ),
    Model(
        "DeepSeek R1 Distill Qwen",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        Shape(152_064, 5120, 27_648, 64, 40, 8, query_bias=True),
    ),
    Model("DeepSeek R1 Distill Llama", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", L8B),
    Model("DeepSeek R1 Distill Llama", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", L70B),
    Model("Phi 3", "microsoft/Phi-3-mini-4k-instruct", Shape(32_064, 3072, 8192, 32, 32, 32)),
    Model("Phi 4", "microsoft/phi-4", Shape(100_352, 5120, 17_920, 40, 40, 10)),
    Model("Phi 4", "microsoft/Phi-4-mini-instruct", Shape(200_064, 3072, 8192, 32, 24, 8, tied=True), 131_072),
)  # fmt: skip


def find_family(name: str) -> Family:
    """The family of that name."""
    return next(family for family in FAMILIES if family.name == name)


def find_model(hub_id: str) -> Model | None:
    """The published model of that hub id, letter case apart; None for one that the table does not hold."""
    return next((model for model in MODELS if model.id.lower() == hub_id.lower()), None)


def count_parameters(shape: Shape) -> int:
    """All parameters of a model, vision included; a tied head counts once."""
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    norms = shape.hidden * (shape.norms_per_layer * shape.layers + 1)
    mlps = sum(_mlp(shape, layer) for layer in range(shape.layers))
    text = embeddings + norms + shape.layers * _attention(shape) + mlps
    return text + (_vision(shape, shape.vision) if shape.vision else 0) + shape.cross_layers * _cross_layer(shape)


def has_experts(shape: Shape, layer: int) -> bool:
    """Whether a layer's MLP is a mixture of experts."""
    experts = shape.experts
    return experts is not None and layer >= experts.dense_first and (layer + 1) % experts.every == 0


def _attention(shape: Shape) -> int:
    if shape.latent:
        return _latent_attention(shape, shape.latent)
    queries, keys = shape.heads * shape.head, shape.key_value_heads * shape.head
    weights = 2 * shape.hidden * (queries + keys)
    biases = queries + 2 * keys if shape.query_bias else 0
    return weights + biases + (2 * shape.head if shape.head_norms else 0)


def _latent_attention(shape: Shape, latent: LatentAttention) -> int:
    query_outputs = shape.heads * (latent.no_rope_size + latent.rope_size)
    query = shape.hidden * query_outputs
    if latent.query_rank:
        query = latent.query_rank * (shape.hidden + 1 + query_outputs)
    compressed = shape.hidden * (latent.key_value_rank + latent.rope_size) + latent.key_value_rank
    expanded = latent.key_value_rank * shape.heads * (latent.no_rope_size + latent.value_size)
    return query + compressed + expanded + shape.heads * latent.value_size * shape.hidden


def _mlp(shape: Shape, layer: int) -> int:
    experts = shape.experts
    if experts is None or not has_experts(shape, layer):
        return 3 * shape.hidden * shape.intermediate
    router = experts.count * (shape.hidden + experts.router_bias)
    return router + 3 * shape.hidden * (experts.count * experts.intermediate + experts.shared_intermediate)


def _cross_layer(shape: Shape) -> int:
    """A layer of Llama 3.2 vision that attends to the image: head norms, two layer norms, two gates."""
    keys = shape.key_value_heads * shape.head
    attention = 2 * shape.hidden * (shape.hidden + keys) + 2 * shape.head
    return attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden + 2


def _vision(shape: Shape, vision: Vision) -> int:
    """The tower and the projector into the text model."""
    return VISION_COUNTS[vision.kind](shape, vision)


def _siglip(shape: Shape, vision: Vision) -> int:
    """Gemma 3's: patches with a bias, learned positions, layer norms with biases; the projector has a norm."""
    width, positions = vision.hidden, (vision.image // vision.patch) ** 2
    embeddings = 3 * vision.patch**2 * width + width + positions * width
    projector = width * shape.hidden + width
    return embeddings + vision.layers * _vision_layer(vision, attention_bias=True) + 2 * width + projector


def _mllama(shape: Shape, vision: Vision) -> int:
    """Llama 3.2's: up to 4 tiles in 9 arrangements, 8 global layers with two gates; five layers' outputs are kept."""
    width, positions = vision.hidden, (vision.image // vision.patch) ** 2 + 1
    layer = _vision_layer(vision, attention_bias=False)
    embeddings = 3 * vision.patch**2 * width + width + positions * width + 9 * 4 * positions * width + 1
    tiles = 2 * (9 * 4 * width + 1)
    tower = embeddings + tiles + 4 * width + vision.layers * layer + 8 * (layer + 2)
    extra_tokens = 8 * shape.hidden  # the embedding has 8 rows more than the head
    return tower + 6 * width * shape.hidden + shape.hidden + extra_tokens


def _llama4(shape: Shape, vision: Vision) -> int:
    """Llama 4's: four patches become one vector of 4,096 by a two-layer MLP."""
    width, positions = vision.hidden, (vision.image // vision.patch) ** 2 + 1
    embeddings = 3 * vision.patch**2 * width + width + positions * width + 4 * width
    shuffled = 4 * width * 4096 + 4096 * 4096
    return embeddings + vision.layers * _vision_layer(vision, attention_bias=True) + shuffled + 4096 * shape.hidden


def _vision_layer(vision: Vision, *, attention_bias: bool) -> int:
    width = vision.hidden
    attention = 4 * width * (width + attention_bias)
    return attention + 2 * width * vision.intermediate + vision.intermediate + width + 4 * width


VISION_COUNTS = {"siglip": _siglip, "mllama": _mllama, "llama4": _llama4}
