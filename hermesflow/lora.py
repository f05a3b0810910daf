"""Low-rank adapters (Hu et al., https://arxiv.org/abs/2106.09685): W + 2·B·A, of which W is frozen.

They lie beside all linear layers of the transformer, as peft injects them. Embeddings, norms and
the head stay as they are. B begins as zero, so the network with adapters is its own reference.
"""

import math

import torch
from torch import nn

from hermesflow.files import InputError
from hermesflow.sampling import stable_seed, uniforms

SCALE = 2  # of B·A, whatever the rank: peft's alpha is 2·rank
# in which autocast multiplies: held so, frozen matrices give the same bits in half the memory
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def add_adapters(net: nn.Module, rank: int, seed: tuple, precision: str = "no") -> None:
    """Freeze a network, and put A (rank, in) and B (out, rank), float32, beside its linear layers.

    A is drawn as a linear layer's weights are, from (seed, its name). precision: that of autocast.
    Raises InputError if the rank is above the network's width: whole matrices would be smaller.
    """
    from peft import LoraConfig, inject_adapter_in_model  # optional

    blocks = net.blocks
    width = blocks.config.hidden_size
    if rank > width:
        raise InputError(f"--lora {rank}: the network is {width} wide; a rank is at most that")
    net.requires_grad_(False)
    names = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, blocks)
    for name, p in net.named_parameters():
        if "lora_A" in name:
            draws = uniforms(stable_seed(*seed, name), *p.shape)  # (rank, in), in [0, 1)
            p.data.copy_((2 * draws - 1) / math.sqrt(p.shape[1]))
    if precision in HALF:
        for module in net.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(HALF[precision])


@torch.no_grad()
def merge_adapters(net: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + 2·B·A: all weights of a network that has no adapters, on the CPU and in its precision.

    weights: of the same network with adapters, by their names there.
    """
    for name, A in weights.items():
        layer, is_A, rest = name.partition(".lora_A.")
        if is_A:
            B = weights[f"{layer}.lora_B.{rest}"]
            net.get_parameter(f"{layer}.weight").add_(SCALE * B.cpu() @ A.cpu())
    return net.state_dict()
