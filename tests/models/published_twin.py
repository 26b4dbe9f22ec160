"""The published model's function in plain torch on a state dict in published names, for shapes no golden has.

Written from the description of the published code alone; it shares nothing with msv. Maps are (B, C, H, W).
"""

import torch
import torch.nn.functional as F

FULL = {1: ("row",), 2: ("row", "col"), 3: ("row", "col", "rowR"), 4: ("row", "col", "rowR", "colR")}
HALF = {1: ("rowR", "col", "colR"), 2: ("rowR", "colR"), 3: ("colR",), 4: ()}


def forward(weights, images, full_scans):
    """Logits (B, classes) of images (B, 3, H, W)."""
    x = conv(images, weights, "patch_embed.0", stride=4)
    x = norm(x, weights, "patch_embed.2")
    for stage in range(4):
        block = 0
        while f"layers.{stage}.blocks.{block}.norm.weight" in weights:
            at = f"layers.{stage}.blocks.{block}"
            x = x + mixer(norm(x, weights, f"{at}.norm"), weights, f"{at}.op", full_scans)
            if f"{at}.norm2.weight" in weights:
                x = x + ffn(norm(x, weights, f"{at}.norm2"), weights, f"{at}.convFFN")
            block += 1
        if stage < 3:
            x = merge(x, weights, f"layers.{stage}.downsample")
    pooled = norm(x, weights, "classifier.norm").mean((2, 3))
    return F.linear(pooled, weights["classifier.head.weight"], weights["classifier.head.bias"])


def conv(x, weights, at, stride=1, groups=1, padding=0):
    return F.conv2d(x, weights[f"{at}.weight"], weights[f"{at}.bias"], stride, padding, 1, groups)


def norm(x, weights, at):
    scaled = F.layer_norm(x.movedim(1, -1), x.shape[1:2], weights[f"{at}.weight"], weights[f"{at}.bias"], 1e-5)
    return scaled.movedim(-1, 1)


def linear(x, weight):
    return torch.einsum("bchw,dc->bdhw", x, weight)


def merge(x, weights, at):
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    x = torch.cat([x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=1)
    return linear(norm(x, weights, f"{at}.norm"), weights[f"{at}.reduction.weight"])


def ffn(x, weights, at):
    x = conv(x, weights, f"{at}.linear1")
    x = F.gelu(x + conv(x, weights, f"{at}.dwc", groups=x.shape[1], padding=1))
    return conv(x, weights, f"{at}.linear2")


def mixer(x, weights, at, full_scans):
    x, z = linear(x, weights[f"{at}.in_proj.weight"]).chunk(2, dim=1)
    channels = x.shape[1]
    full = F.silu(conv(x, weights, f"{at}.conv2d", groups=channels, padding=1))
    first = 0 if full_scans == 4 else 1  # index 0 is the half branch's, where there is one
    y = sum(
        off(route, s6(along(route, full), weights, at, first + k), full.shape)
        for k, route in enumerate(FULL[full_scans])
    )
    y = norm(y, weights, f"{at}.out_norm")
    if full_scans < 4:
        half = F.silu(conv(x, weights, f"{at}.conv2d_b1", stride=2, groups=channels, padding=3))
        joined = s6(torch.cat([along(route, half) for route in HALF[full_scans]], dim=2), weights, at, 0)
        pieces = joined.split(half.shape[2] * half.shape[3], dim=2)
        routes = zip(HALF[full_scans], pieces, strict=True)
        low = sum(norm(off(route, piece, half.shape), weights, f"{at}.out_norm") for route, piece in routes)
        y = y + F.interpolate(low, size=x.shape[2:], mode="bilinear", align_corners=False)
    if f"{at}.se.fc.0.weight" in weights:
        gate = F.relu(F.linear(y.mean((2, 3)), weights[f"{at}.se.fc.0.weight"]))
        y = y * F.linear(gate, weights[f"{at}.se.fc.2.weight"]).sigmoid()[:, :, None, None]
    return linear(y * F.silu(z), weights[f"{at}.out_proj.weight"])


def along(route, x):
    """The map as a sequence (B, D, L) in the order of the route."""
    x = (x.transpose(2, 3) if route.startswith("col") else x).flatten(2)
    return x.flip(2) if route.endswith("R") else x


def off(route, y, shape):
    """The sequence of a route put back on a map of the shape (B, D, H, W)."""
    y = y.flip(2) if route.endswith("R") else y
    batch, channels, height, width = shape
    if route.startswith("col"):
        return y.reshape(batch, channels, width, height).transpose(2, 3)
    return y.reshape(batch, channels, height, width)


def s6(u, weights, at, index):
    """Eqs. 1-4, token by token, of u (B, D, L) with the weight set at `index`."""
    channels = u.shape[1]
    rows = slice(index * channels, (index + 1) * channels)
    A = -weights[f"{at}.A_logs"][rows].exp()
    dt_weight = weights[f"{at}.dt_projs_weight"][index]
    rank, states = dt_weight.shape[1], A.shape[1]
    low, B, C = torch.einsum("bdl,rd->brl", u, weights[f"{at}.x_proj_weight"][index]).split([rank, states, states], 1)
    delta = torch.einsum("brl,dr->bdl", low, dt_weight) + weights[f"{at}.dt_projs_bias"][index][:, None]
    delta = F.softplus(delta)
    h = u.new_zeros(*u.shape[:2], states)
    found = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = (step * A).exp() * h + step * B[:, None, :, t] * u[:, :, t, None]
        found.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(found, dim=2) + weights[f"{at}.Ds"][rows, None] * u
