"""The models of these pages: real ones, small enough to train for a step on a CPU in milliseconds."""

import torch
from torch import nn


class Block(nn.Module):
    """A residual block: x + relu(norm(conv(x)))."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class ConvNet(nn.Module):
    """Images of any size -> classes; keys stem.*, norm.*, blocks.0.* to blocks.3.*, head.*."""

    def __init__(self, classes=1000, in_chans=3, width=8, depth=4):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, width, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        return self.head(self.blocks(self.norm(self.stem(images)).relu()).mean(dim=(2, 3)))


class ViT(nn.Module):
    """Square images of one size -> classes; a class token and a grid of patches, each with a learned position."""

    def __init__(self, classes=1000, image=16, patch=4, width=16, depth=2):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (image // patch) ** 2, width) * 0.02)
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(tokens + self.pos_embed)[:, 0]))


class LanguageModel(nn.Module):
    """Token ids -> scores of the next token; the output layer is tied to the embedding."""

    def __init__(self, vocabulary=100, width=16):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.block(self.embed(ids), src_mask=mask, is_causal=True))
