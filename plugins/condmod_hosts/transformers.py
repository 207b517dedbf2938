"""Layers of transformers: all read and give (B, T, C), but for those of ConvNeXt and ResNet."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from condmod import Layer
from condmod_hosts._refusals import output_alone


def _family(name: str, prefix: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Layers of one family, by the end of their name."""
    return {
        f"transformers.models.{name}.modeling_{name}.{prefix}{end}": layer
        for end, layer in layers.items()
    }


def _weight(norm: Any) -> int:
    return int(norm.weight.shape[0])


_IDS = output_alone("ids")
_WORDS = Layer(attrgetter("word_embeddings.embedding_dim"), refuses=_IDS)
_DENSE = Layer(attrgetter("dense.out_features"), attrgetter("dense.in_features"))
_NORM = Layer(_weight)

_BERT = {
    "Embeddings": _WORDS,
    "SelfAttention": Layer(attrgetter("value.out_features"), attrgetter("query.in_features")),
    "SelfOutput": _DENSE,
    "Attention": Layer(attrgetter("output.dense.out_features")),
    "Intermediate": _DENSE,
    "Output": _DENSE,
    "Layer": Layer(attrgetter("output.dense.out_features")),
}
_LLAMA = {
    "RMSNorm": _NORM,
    "Attention": Layer(attrgetter("o_proj.out_features")),
    "MLP": Layer(attrgetter("down_proj.out_features")),
    "DecoderLayer": Layer(attrgetter("mlp.down_proj.out_features")),
}
_BART_ATTENTION = Layer(attrgetter("out_proj.out_features"))
_FC2 = Layer(attrgetter("fc2.out_features"))
_BART = {"Attention": _BART_ATTENTION, "EncoderLayer": _FC2, "DecoderLayer": _FC2}
_CLIP = {
    "Attention": _BART_ATTENTION,
    "MLP": _FC2,
    "EncoderLayer": Layer(attrgetter("mlp.fc2.out_features")),
}
_VIT = {
    "PatchEmbeddings": Layer(
        attrgetter("projection.out_channels"), refuses=output_alone("an image")
    ),
    "Attention": Layer(attrgetter("o_proj.out_features")),
    "MLP": _FC2,
    "Layer": Layer(attrgetter("attention.o_proj.out_features")),
}
_WO = Layer(attrgetter("wo.out_features"))

LAYERS: Mapping[str, Layer] = {
    "transformers.pytorch_utils.Conv1D": Layer(attrgetter("nf"), attrgetter("nx")),
    **_family("bert", "Bert", _BERT),
    **_family("roberta", "Roberta", _BERT),
    **_family("xlm_roberta", "XLMRoberta", _BERT),
    **_family("electra", "Electra", {**_BERT, "Embeddings": _WORDS}),
    **_family(
        "mpnet",
        "MPNet",
        {
            "Embeddings": _WORDS,
            "SelfAttention": Layer(attrgetter("o.out_features")),
            "Attention": Layer(attrgetter("attn.o.out_features")),
            "Intermediate": _DENSE,
            "Output": _DENSE,
            "Layer": Layer(attrgetter("output.dense.out_features")),
        },
    ),
    **_family(
        "distilbert",
        "",
        {
            "Embeddings": _WORDS,
            "DistilBertSelfAttention": Layer(attrgetter("out_lin.out_features")),
            "FFN": Layer(attrgetter("lin2.out_features")),
            "TransformerBlock": Layer(attrgetter("ffn.lin2.out_features")),
        },
    ),
    **_family(
        "modernbert",
        "ModernBert",
        {
            "Embeddings": Layer(attrgetter("tok_embeddings.embedding_dim"), refuses=_IDS),
            "Attention": Layer(attrgetter("Wo.out_features")),
            "MLP": Layer(attrgetter("Wo.out_features")),
            "EncoderLayer": Layer(attrgetter("mlp.Wo.out_features")),
        },
    ),
    **_family(
        "gpt2",
        "GPT2",
        {
            "Attention": Layer(attrgetter("c_proj.nf")),
            "MLP": Layer(attrgetter("c_proj.nf")),
            "Block": Layer(attrgetter("mlp.c_proj.nf")),
        },
    ),
    **_family(
        "gpt_neox",
        "GPTNeoX",
        {
            "Attention": Layer(attrgetter("dense.out_features")),
            "MLP": Layer(attrgetter("dense_4h_to_h.out_features")),
            "Layer": Layer(attrgetter("mlp.dense_4h_to_h.out_features")),
        },
    ),
    **_family("llama", "Llama", _LLAMA),
    **_family("mistral", "Mistral", _LLAMA),
    **_family(
        "mixtral",
        "Mixtral",
        {
            "RMSNorm": _NORM,
            "Attention": _LLAMA["Attention"],
            "DecoderLayer": Layer(attrgetter("self_attn.o_proj.out_features")),
        },
    ),
    **_family("qwen2", "Qwen2", _LLAMA),
    **_family("qwen3", "Qwen3", _LLAMA),
    **_family("gemma", "Gemma", _LLAMA),
    **_family("gemma2", "Gemma2", _LLAMA),
    **_family("gemma3", "Gemma3", _LLAMA),
    **_family("phi3", "Phi3", _LLAMA),
    **_family("opt", "OPT", {"Attention": _BART_ATTENTION, "DecoderLayer": _FC2}),
    **_family("bart", "Bart", _BART),
    **_family("whisper", "Whisper", _BART),
    **_family(
        "t5",
        "T5",
        {
            "LayerNorm": _NORM,
            "Attention": Layer(attrgetter("o.out_features")),
            "DenseActDense": _WO,
            "DenseGatedActDense": _WO,
            "LayerFF": Layer(attrgetter("DenseReluDense.wo.out_features")),
            "LayerSelfAttention": Layer(attrgetter("SelfAttention.o.out_features")),
            "LayerCrossAttention": Layer(attrgetter("EncDecAttention.o.out_features")),
            "Block": Layer(lambda m: m.layer[-1].DenseReluDense.wo.out_features),
        },
    ),
    **_family("vit", "ViT", _VIT),
    **_family("dinov2", "Dinov2", _VIT),
    "transformers.models.dinov2.modeling_dinov2.Dinov2LayerScale": Layer(
        lambda m: m.lambda1.shape[0]
    ),
    **_family("clip", "CLIP", _CLIP),
    **_family("siglip", "Siglip", _CLIP),
    **_family(
        "wav2vec2",
        "Wav2Vec2",
        {
            "Attention": _BART_ATTENTION,
            "FeedForward": Layer(attrgetter("output_dense.out_features")),
            "EncoderLayer": Layer(attrgetter("feed_forward.output_dense.out_features")),
        },
    ),
    **_family(
        "convnext",
        "ConvNext",
        {
            "LayerNorm": Layer(
                lambda m: m.normalized_shape[0],
                channel_dim=lambda m: 1 if m.data_format == "channels_first" else -1,
            ),
            "Layer": Layer(attrgetter("dwconv.out_channels"), channel_dim=1),
        },
    ),
    "transformers.models.resnet.modeling_resnet.ResNetConvLayer": Layer(
        attrgetter("convolution.out_channels"), attrgetter("convolution.in_channels"), channel_dim=1
    ),
}
