"""The rotation of queries and keys: the model's own single steps against one kernel, there and with the way back.

Called by scale.py (`--what rotary`).
"""

import torch
from scale_drivers import Row, seconds
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from spectrim.nn.kernels.launch import missing
from spectrim.nn.rotary import rotated

LENGTH = 2048


def rotary(tokens: int, heads: int, size: int, device: torch.device) -> Row:
    """Seconds of queries and keys (tokens, heads, size) in bf16, as attention has them; and how far the two differ."""
    length = min(LENGTH, tokens)
    q, k, up_q, up_k = (
        torch.randn(tokens // length, length, heads, size, device=device).bfloat16().transpose(1, 2).requires_grad_()
        for _ in range(4)
    )
    angles = torch.outer(torch.arange(length), 1e4 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)[None].to(device)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def steps() -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin)
        return turned

    def fused() -> tuple[Tensor, Tensor]:
        return rotated(q, cos, sin), rotated(k, cos, sin)

    found: Row = {"tokens": tokens, "heads": heads, "size": size}
    ways = {"steps": steps}
    if missing() is None:
        ways["fused"] = fused
    else:
        found["no kernel"] = str(missing())
    made = {}
    for name, work in ways.items():
        with torch.no_grad():
            found[name] = seconds(work, device, repeats=3)
        back = lambda w=work: torch.autograd.grad(w(), (q, k), (up_q.detach(), up_k.detach()))  # noqa: E731  timed
        found[f"{name}, and back"] = seconds(back, device, repeats=3)
        made[name] = [*work(), *back()]
    if "fused" in made:
        pairs = zip(made["steps"], made["fused"], strict=True)
        found["largest difference"] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    gigabytes = 2 * 2 * q.nbytes / 1e9  # both are read and written once
    found |= {f"{name}, gb_per_s": gigabytes / found[name] for name in made}
    return found
