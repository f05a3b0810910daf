"""Inception-v3 as pytorch-fid converted it from TensorFlow: the features of FID.

A block is a list of branches, a branch a list of steps: a convolution (name, width, kernel), a
pooling by name, or a list of convolutions side by side. Names are those of the weights file. A
kernel n, or a pair, is padded to keep the size; "n/2" halves it, without padding.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def inception_a(pool: int) -> list:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["avg", ("branch_pool", pool, 1)],
    ]


def inception_b() -> list:
    return [
        [("branch3x3", 384, "3/2")],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, "3/2")],
        ["max/2"],
    ]


def inception_c(c: int) -> list:
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
         ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
        ["avg", ("branch_pool", 192, 1)],
    ]


def inception_d() -> list:
    return [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, "3/2")],
        [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
         ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, "3/2")],
        ["max/2"],
    ]


def inception_e(pool: str) -> list:
    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
         [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
        [pool, ("branch_pool", 192, 1)],
    ]


BLOCKS = {
    "Mixed_5b": inception_a(32),
    "Mixed_5c": inception_a(64),
    "Mixed_5d": inception_a(64),
    "Mixed_6a": inception_b(),
    "Mixed_6b": inception_c(128),
    "Mixed_6c": inception_c(160),
    "Mixed_6d": inception_c(160),
    "Mixed_6e": inception_c(192),
    "Mixed_7a": inception_d(),
    "Mixed_7b": inception_e("avg"),
    "Mixed_7c": inception_e("max"),  # TensorFlow's graph pools by maximum here, not by mean
}
POOLS = {
    "avg": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "max": nn.MaxPool2d(3, 1, 1),
    "max/2": nn.MaxPool2d(3, 2),
}


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def block_conv(c_in: int, width: int, kernel) -> Conv:
    """A convolution of a block; kernel as in the table above."""
    if isinstance(kernel, str):
        return Conv(c_in, width, int(kernel[0]), stride=2)
    padding = tuple(k // 2 for k in np.broadcast_to(kernel, 2).tolist())
    return Conv(c_in, width, kernel, padding=padding)


class Mixed(nn.ModuleDict):
    """One block: its branches side by side."""

    def __init__(self, c_in: int, branches: list):
        super().__init__()
        self.branches = branches
        self.width = sum(self.build(c_in, branch) for branch in branches)

    def build(self, c: int, branch: list) -> int:
        """Add the convolutions of a branch; returns its width."""
        for step in branch:
            if isinstance(step, list):
                c = sum(self.build(c, [conv]) for conv in step)
            elif isinstance(step, tuple):
                name, width, kernel = step
                self[name] = block_conv(c, width, kernel)
                c = width
        return c

    def apply_branch(self, x, branch: list):
        for step in branch:
            if isinstance(step, list):
                x = torch.cat([self.apply_branch(x, [conv]) for conv in step], 1)
            elif isinstance(step, tuple):
                x = self[step[0]](x)
            else:
                x = POOLS[step](x)
        return x

    def forward(self, x):
        return torch.cat([self.apply_branch(x, branch) for branch in self.branches], 1)


class Inception(nn.Module):
    """(B, 3, 299, 299) in [-1, 1] -> (B, 2048) pooled features."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        width = 192
        for name, branches in BLOCKS.items():
            block = Mixed(width, branches)
            setattr(self, name, block)
            width = block.width
        self.fc = nn.Linear(width, 1008)  # in the weights file, not used

    def forward(self, x):
        x = self.Conv2d_1a_3x3(x)  # (B, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)  # (B, 32, 147, 147)
        x = POOLS["max/2"](self.Conv2d_2b_3x3(x))  # (B, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x)  # (B, 80, 73, 73)
        x = POOLS["max/2"](self.Conv2d_4a_3x3(x))  # (B, 192, 35, 35)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))  # (B, 2048) from (B, 2048, 8, 8)
