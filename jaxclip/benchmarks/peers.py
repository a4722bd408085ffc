"""CLIP of open_clip and of transformers in PyTorch, with towers of this package's shape and the same training step.

Weights are random, and pictures are already normalised. Both use fused AdamW and clip the norm of the gradient, like
this package's step. On a GPU they are compiled. They run under autocast if the configuration asks for bfloat16.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxclip.models.clip import CLIPConfig, ImageConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MATRIX = 2048  # equals train_step.MATRIX; this process does not import that module


def open_clip(shape: CLIPConfig, rows: int) -> dict[str, Callable[[], Any]]:
    """Returns the calls of open_clip's CLIP with its ClipLoss for batches of `rows` pairs."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP

    image, text = shape.image.transformer, shape.text.transformer
    activation_arguments = {"approximate": "tanh"} if image.activation == "gelu_tanh" else None
    model = CLIP(
        shape.embedding,
        {
            "layers": image.layers, "width": image.width, "head_width": image.width // image.heads,
            "patch_size": shape.image.patch, "image_size": shape.image.size, "act_kwargs": activation_arguments,
            "pool_type": "tok" if shape.image.pooling == "class" else "avg",
        },
        {
            "context_length": shape.text.context_length, "vocab_size": shape.text.vocab_size, "width": text.width,
            "heads": text.heads, "layers": text.layers, "act_kwargs": activation_arguments,
        },
        quick_gelu=image.activation == "quick_gelu",
    )  # fmt: skip
    if shape.image.stem != "patch":
        model.visual.conv1 = TorchConvStem(shape.image)
    loss = ClipLoss()

    def value(pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return loss(*model(pixels, tokens)[:3])

    return _calls(model, value, model.encode_image, model.encode_text, shape, rows)


def transformers(shape: CLIPConfig, rows: int) -> dict[str, Callable[[], Any]]:
    """Returns the calls of transformers' CLIPModel with its own loss for batches of `rows` pairs."""
    import transformers as hugging_face

    image, text = shape.image.transformer, shape.text.transformer
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(image.activation, image.activation)

    def tower(transformer: Any) -> dict[str, Any]:
        return {
            "hidden_size": transformer.width,
            "intermediate_size": round(transformer.width * transformer.mlp_ratio),
            "hidden_act": activation, "num_hidden_layers": transformer.layers,
            "num_attention_heads": transformer.heads,
            "projection_dim": shape.embedding,
        }  # fmt: skip

    model = hugging_face.CLIPModel(
        hugging_face.CLIPConfig(
            vision_config=tower(image) | {"image_size": shape.image.size, "patch_size": shape.image.patch},
            text_config=tower(text)
            | {
                "vocab_size": shape.text.vocab_size, "max_position_embeddings": shape.text.context_length,
                "eos_token_id": shape.text.end_token, "bos_token_id": shape.text.end_token - 1,
                "pad_token_id": shape.text.end_token,
            },
            projection_dim=shape.embedding,
        )
    )  # fmt: skip
    if shape.image.stem != "patch":
        model.vision_model.embeddings.patch_embedding = TorchConvStem(shape.image)

    def value(pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss

    def encode_image(pixels: torch.Tensor) -> Any:
        return model.get_image_features(pixel_values=pixels)

    def encode_text(tokens: torch.Tensor) -> Any:
        return model.get_text_features(input_ids=tokens)

    return _calls(model, value, encode_image, encode_text, shape, rows)


class TorchConvStem(nn.Module):
    """`models.stem.ConvStem` in PyTorch: B pictures (B, 3, S, S) -> W channels, (B, W, S / patch, S / patch)."""

    def __init__(self, config: ImageConfig):
        super().__init__()
        width, halvings = config.transformer.width, config.patch.bit_length() - 1
        widths = [3] + [max(8, (3 * width // 4) >> (halvings - 1 - i)) for i in range(halvings)]
        self.halvings = nn.ModuleList(
            nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(b) for b in widths[1:])
        inner_widths = widths[2:-1] if config.stem == "residual_conv" else []
        self.residuals = nn.ModuleList(nn.Conv2d(b, b, 3, 1, 1, bias=False) for b in inner_widths)
        self.residual_norms = nn.ModuleList(nn.LayerNorm(b) for b in inner_widths)
        self.projection = nn.Conv2d(widths[-1], width, 1)
        self.weight = self.projection.weight  # transformers reads the dtype of patch_embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def normalise(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
            return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        for number, (halve, norm) in enumerate(zip(self.halvings, self.norms, strict=True)):
            x = nn.functional.gelu(normalise(norm, halve(x)), approximate="tanh")
            if 0 < number <= len(self.residuals):
                convolve, residual_norm = self.residuals[number - 1], self.residual_norms[number - 1]
                x = x + 0.5 * nn.functional.gelu(convolve(normalise(residual_norm, x)), approximate="tanh")
        return self.projection(x)


def _calls(
    model: nn.Module, value: Callable, encode_image: Callable, encode_text: Callable, shape: CLIPConfig, rows: int
) -> dict[str, Callable[[], Any]]:
    """Returns the calls to measure for batches of `rows` pairs; `value` is the loss of (pixels, tokens)."""
    random = np.random.default_rng(0)
    size, length, end = shape.image.size, shape.text.context_length, shape.text.end_token
    token_ids = random.integers(0, end, (rows, length))
    token_ids[:, -1] = end
    pixels = torch.from_numpy(random.standard_normal((rows, 3, size, size), np.float32)).to(DEVICE)
    tokens = torch.from_numpy(token_ids).to(DEVICE)
    model.to(DEVICE).train()
    if DEVICE == "cuda":
        value, encode_image, encode_text = map(torch.compile, (value, encode_image, encode_text))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True
    )
    bfloat16 = shape.image.transformer.dtype == "bfloat16"
    precision = (lambda: torch.autocast(DEVICE, torch.bfloat16)) if bfloat16 else nullcontext

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with precision():
            loss = value(pixels, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def forward(encode: Callable, batch: torch.Tensor) -> None:
        with torch.inference_mode(), precision():
            encode(batch)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    square = torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16 if bfloat16 else torch.float32, device=DEVICE)
    return {
        "images": lambda: forward(encode_image, pixels),
        "texts": lambda: forward(encode_text, tokens),
        "train step": step,
        "parameters": lambda: sum(parameter.numel() for parameter in model.parameters()),
        "product": lambda: float((square @ square)[0, 0]),
        "memory": lambda: torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
    }
