"""The DiT and the U-Net of `generators/nets.py` and their update in PyTorch, eager: what `benchmarks/engine.py` measures against.

Layer by layer the same computation under the same names, so that parameters can be carried over and outputs compared. Usual good
practice of PyTorch: fused attention, fused AdamW, averages by one `foreach` call, memory formats as asked for.
Speaks the protocol of `engine.py`, on one processor core:

  python benchmarks/engine_torch.py dit PARAMETERS.npz [--channels-last]
"""

import json
import math
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

torch.set_num_threads(1)


class Embedding(nn.Module):
    def __init__(self, width, waves=32):
        super().__init__()
        self.register_buffer("waves", torch.exp(torch.linspace(0.0, math.log(100.0), waves)), persistent=False)
        self.first, self.second = nn.Linear(2 * waves, width), nn.Linear(width, width)

    def forward(self, noise_level):
        phase = noise_level[:, None] * self.waves
        return F.silu(self.second(F.silu(self.first(torch.cat([phase.sin(), phase.cos()], -1)))))


class TransformerBlock(nn.Module):
    def __init__(self, width, heads, embedding):
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(embedding, 6 * width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h, e):
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(e)[:, None].chunk(6, -1)
        h = h + gate1 * self.mix(attend(self.qkv(layer_norm(h, scale1, shift1)), self.heads))
        return h + gate2 * self.contract(F.gelu(self.expand(layer_norm(h, scale2, shift2)), approximate="tanh"))


class DiT(nn.Module):
    def __init__(self, width, depth, heads, patch, embedding, size, channels):
        super().__init__()
        self.patch, self.width = patch, width
        self.positions = nn.Parameter(torch.zeros((size // patch) ** 2, width))
        self.embed = Embedding(embedding)
        self.inward = nn.Linear(patch * patch * channels, width)
        self.blocks = nn.ModuleList([TransformerBlock(width, heads, embedding) for _ in range(depth)])
        self.modulate, self.outward = nn.Linear(embedding, 2 * width), nn.Linear(width, patch * patch * channels)

    def forward(self, x, noise_level):  # [batch, channel, y, x]
        b, c, height, _ = x.shape
        n, p = height // self.patch, self.patch
        e = self.embed(noise_level)
        h = self.inward(x.reshape(b, c, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(b, n * n, -1)) + self.positions
        for block in self.blocks:
            h = block(h, e)
        scale, shift = self.modulate(e)[:, None].chunk(2, -1)
        return self.outward(layer_norm(h, scale, shift)).reshape(b, n, n, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def attend(qkv, heads):
    b, n, _ = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)


def layer_norm(h, scale, shift):
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, width_in, width, embedding):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * width)
        self.norm2, self.conv2 = GroupNorm(width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1, bias=False) if width_in != width else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(e)[:, :, None, None].chunk(2, 1)
        return self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift)) + self.skip(x)


class GroupNorm(nn.GroupNorm):
    def __init__(self, width):
        super().__init__(math.gcd(8, width), width, eps=1e-5)


class SelfAttention(nn.Module):
    def __init__(self, width, head=32):
        super().__init__()
        self.heads = max(1, width // head)
        self.norm, self.qkv, self.mix = GroupNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, e):
        y = self.mix(attend(self.qkv(self.norm(x).flatten(2).transpose(1, 2)), self.heads))
        return x + y.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    def __init__(self, widths, blocks, embedding, channels):
        super().__init__()
        self.embed = Embedding(embedding)
        self.inward = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for width, last in zip(widths, (widths[0], *widths), strict=False):
            self.down.append(nn.ModuleList([Block(width if i else last, width, embedding) for i in range(blocks)]))
        self.middle = nn.ModuleList([Block(widths[-1], widths[-1], embedding), SelfAttention(widths[-1])])
        for width, below in zip(widths, (*widths[1:], widths[-1]), strict=True):
            self.merge.append(nn.Conv2d(below, width, 1))
            self.up.append(nn.ModuleList([Block(width if i else 2 * width, width, embedding) for i in range(blocks)]))
        self.norm, self.outward = GroupNorm(widths[0]), nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x, noise_level):
        e = self.embed(noise_level)
        h, skips = self.inward(x), []
        for level, blocks in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if level else h
            for block in blocks:
                h = block(h, e)
            skips.append(h)
        for block in self.middle:
            h = block(h, e)
        for level in reversed(range(len(skips))):
            h = self.merge[level](h)
            h = h if h.shape == skips[level].shape else F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = torch.cat([h, skips[level]], 1)
            for block in self.up[level]:
                h = block(h, e)
        return self.outward(F.silu(self.norm(h)))


def load(net, arrays):
    """Puts parameters named as in the nnx module into `net`; every one of both must find its partner, in size too."""
    own = dict(net.named_parameters())
    for path, value in arrays.items():
        name = path.replace("/kernel", "/weight").replace("/scale", "/weight").replace("/", ".")
        target = own.pop(name)
        if path.endswith("qkv/kernel"):  # [in, 3, head, channel]
            value = value.reshape(len(value), -1)
        if path.endswith("kernel"):  # [..., in, out] -> [out, in, ...]
            value = np.moveaxis(value, (-1, -2), (0, 1))
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.ascontiguousarray(value)).reshape(target.shape))
    if own:
        raise SystemExit(f"PyTorch has more parameters: {', '.join(own)}")


def denoise(net, x, sigma):
    """EDM's preconditioning with sigma_data = 1."""
    s = sigma[:, None, None, None]
    total = 1 + s.square()
    return x / total + s * total.rsqrt() * net(x * total.rsqrt(), sigma.log() / 4)


def make_step(net, x):
    """One update on the batch `x`: noise, EDM loss, shortened gradient, AdamW, one average."""
    parameters = list(net.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-2},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    ema = [p.detach().clone() for p in parameters]

    def step():
        sigma = (torch.randn(len(x)) * 1.2 - 1.2).exp()
        s = sigma[:, None, None, None]
        optimizer.zero_grad(set_to_none=True)
        error = (denoise(net, x + s * torch.randn_like(x), sigma) - x) / (s * (1 + s.square()).rsqrt())
        loss = error.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(ema, parameters, 0.001)
        return float(loss.detach())

    return step


def main():
    name, path = sys.argv[1:3]
    given = dict(np.load(path))
    x, sigma, sizes = (given.pop(key) for key in ("x", "sigma", "sizes"))
    net = {"dit": DiT, "unet": UNet}[name](**json.loads(str(sizes)))
    load(net, given)
    x, sigma = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(sigma)
    if "--channels-last" in sys.argv:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        first = denoise(net, x, sigma).permute(0, 2, 3, 1)
        np.save(path.replace(".npz", ".torch.npy"), first.contiguous().numpy())
    step = make_step(net, x)

    def draw():
        with torch.no_grad():
            denoise(net, x, sigma)

    print(f"ready torch {torch.__version__}", flush=True)
    for line in sys.stdin:
        what, count = line.split()
        begun = time.process_time()
        for _ in range(int(count)):
            {"train": step, "denoise": draw}[what]()
        print((time.process_time() - begun) / int(count), flush=True)


if __name__ == "__main__":
    main()
