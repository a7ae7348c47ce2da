"""Which parameters the benchmark steps, shapes written from papers and configurations, and their formats."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Shapes = list[tuple[int, ...]]

GPT2_BLOCKS = 12
# Two blocks and the embeddings are 54 M parameters: still far beyond any cache.
GPT2_BLOCKS_QUICK = 2
SMALL_NUMEL = 256


@dataclass(frozen=True)
class Model:
    """What an optimizer sees of a model.

    name: of its rows.
    title: for a reader.
    dtypes: of each tensor; empty: float32 for all.
    """

    name: str
    title: str
    shapes: Shapes
    dtypes: tuple[torch.dtype, ...] = ()


def _gpt_block(width: int) -> Shapes:
    return [
        (width,), (width,),  # ln_1
        (width, 3 * width), (3 * width,),  # attn.c_attn
        (width, width), (width,),  # attn.c_proj
        (width,), (width,),  # ln_2
        (width, 4 * width), (4 * width,),  # mlp.c_fc
        (4 * width, width), (width,),  # mlp.c_proj
    ]  # fmt: skip


def gpt2_small(n_blocks: int = GPT2_BLOCKS) -> Shapes:
    """GPT-2 small with tied output embedding: 148 tensors, 124,439,808 parameters at 12 blocks."""
    width = 768
    blocks = _gpt_block(width) * n_blocks
    return [(50257, width), (1024, width), *blocks, (width,), (width,)]


def billion() -> Shapes:
    """25 blocks of GPT's shapes: 300 tensors, 1,034,023,200 parameters."""
    return _gpt_block(1856) * 25


def resnet50() -> Shapes:
    """torchvision's ResNet-50: 161 tensors, 25,557,032 parameters."""

    def conv_bn(c_in: int, c_out: int, size: int) -> Shapes:
        return [(c_out, c_in, size, size), (c_out,), (c_out,)]

    shapes = conv_bn(3, 64, 7)
    c_in = 64
    for width, n_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(n_blocks):
            shapes += conv_bn(c_in, width, 1) + conv_bn(width, width, 3)
            shapes += conv_bn(width, 4 * width, 1)
            if block == 0:  # the shortcut changes the number of channels once per stage
                shapes += conv_bn(c_in, 4 * width, 1)
            c_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def bert_large() -> Shapes:
    """BERT-large, uncased, with the pooler and without a head: 391 tensors, 335,141,888 parameters."""
    width, hidden = 1024, 4096
    norm: Shapes = [(width,), (width,)]
    square: Shapes = [(width, width), (width,)]
    layer = [
        *square, *square, *square,  # query, key, value
        *square, *norm,  # attention.output
        (hidden, width), (hidden,),  # intermediate
        (width, hidden), (width,), *norm,  # output
    ]  # fmt: skip
    embeddings: Shapes = [(30522, width), (512, width), (2, width)]
    return [*embeddings, *norm, *layer * 24, *square]


def vit_b16() -> Shapes:
    """torchvision's ViT-B/16: 152 tensors, 86,567,656 parameters."""
    width, hidden = 768, 3072
    norm: Shapes = [(width,), (width,)]
    layer = [
        *norm,
        (3 * width, width), (3 * width,),  # self_attention.in_proj
        (width, width), (width,),  # self_attention.out_proj
        *norm,
        (hidden, width), (hidden,),  # mlp
        (width, hidden), (width,),
    ]  # fmt: skip
    first: Shapes = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*first, *layer * 12, *norm, (1000, width), (1000,)]


def llama3_8b_layer() -> Shapes:
    """One of the 32 layers of Llama-3-8B: 9 tensors, 218,112,000 parameters."""
    width, hidden, key_width = 4096, 14336, 1024
    return [
        (width, width), (key_width, width), (key_width, width), (width, width),  # q, k, v, o
        (hidden, width), (hidden, width), (width, hidden),  # gate, up, down
        (width,), (width,),  # norms
    ]  # fmt: skip


# Name for `bench --model` -> title and shapes.
MODELS: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "resnet50": ("ResNet-50", resnet50),
    "gpt2": ("GPT-2 small", gpt2_small),
    "bert-large": ("BERT-large", bert_large),
    "vit-b": ("ViT-B/16", vit_b16),
    # In float32, AdamW's streams of one layer are 3.5 GB for every contestant.
    "llama-8b-slice": ("one layer of Llama-3-8B", llama3_8b_layer),
    "many-small": (f"2,000 x {SMALL_NUMEL}", lambda: [(SMALL_NUMEL,)] * 2_000),
    "tiny": ("10 x 10", lambda: [(10,)] * 10),
}


def model(name: str) -> Model:
    """The model of that name.

    Args:
        name: a key of MODELS.
    """
    title, shapes = MODELS[name]
    return Model(name, title, shapes())


@dataclass(frozen=True)
class Format:
    """How params and states are stored.

    dtype: of the params; None: as the model has them.
    options: of ours alone that make states or params smaller (FormatOptions). Where there are any, the
        baseline is torch.optim on float32 params with float32 states.
    """

    title: str
    dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)


# The model's own dtypes, with torch.optim's states.
OWN = "own"
_BF16 = torch.bfloat16
FORMATS = {
    OWN: Format(""),
    "float32": Format("float32", torch.float32),
    "bf16": Format("bf16", _BF16),
    "fp16": Format("fp16", torch.float16),
    "int8": Format("int8 states", torch.float32, {"state_dtype": "int8"}),
    "bf16-states": Format("bf16 states", torch.float32, {"state_dtype": _BF16}),
    "split16": Format(
        "bf16 params + split16, bf16 states", _BF16, {"state_dtype": _BF16, "master": "split16"}
    ),
    "split8": Format(
        "bf16 params + split8, int8 states", _BF16, {"state_dtype": "int8", "master": "split8"}
    ),
}
