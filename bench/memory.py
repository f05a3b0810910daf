"""Memory and work of training Show-o's 1.448 B parameters, counted without data and without a GPU.

    python bench/memory.py    # two minutes

One Pair-DPO micro-batch goes through the stage's own packing and network, on tensors that have
shapes and no contents. Activations are the tensors that autograd saves, each counted once.
Parameters, gradients and AdamW's two moments are float32 in all settings: autocast casts a copy of
the weights at every step. With adapters, the frozen matrices are bfloat16 under --precision bf16; the
activations are at most those of full training.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hermesflow.options import stage_parser

if __name__ == "__main__":
    stage_parser(__doc__).parse_args()  # before the heavy imports, so that --help answers at once

from itertools import product

import torch
from torch._subclasses import FakeTensorMode

from bench.bench import dpo_rows, empty_net, flop_counter
from hermesflow.packed import IGNORE, Pack, label_logps, pack
from hermesflow.showo import Showo


def count(net: Showo, packs: list[Pack], labels: list[int]) -> tuple[int, int]:
    """Bytes that the forward pass keeps for backward, without parameters; and FLOP of both passes.

    labels: how many positions of each pack have a label. Which ones does not matter here.
    """
    parameters = {p.untyped_storage()._cdata for p in net.parameters()}
    kept = {}  # storage -> its bytes, and a tensor that keeps it alive

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with flop_counter() as flops:
        total = 0.0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for p, M in zip(packs, labels):
                hidden = net.hidden(p.ids, p.positions, layout=p.layout)  # (B, T, D)
                hidden = hidden.flatten(0, 1)[:M]
                logps = label_logps(hidden, p.ids.flatten()[:M], net.showo.lm_head)  # (M,)
                total = total + logps.sum()
        total.backward()
    return sum(nbytes for nbytes, _ in kept.values()), flops.get_total_flops()


def without_data(p: Pack, fake: FakeTensorMode) -> Pack:
    """A pack whose ids and positions have shapes and no contents."""
    return p._replace(ids=fake.from_tensor(p.ids), positions=fake.from_tensor(p.positions))


def with_adapters(net: Showo, rank: int) -> tuple[int, int]:
    """Bytes of all weights under --lora and --precision bf16, and how many numbers are trained."""
    size = sum(4 * p.numel() for p in net.parameters())
    trained = 0
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            size -= sum(2 * p.numel() for p in module.parameters())  # 2 bytes instead of 4
    for module in net.showo.model.modules():  # the head has no adapter
        if isinstance(module, torch.nn.Linear):
            trained += rank * (module.in_features + module.out_features)
    return size + 4 * trained, trained


def main():
    empty = empty_net("1.3b")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        net = Showo(empty.config, empty.showo.config, empty.tokens).train()
    n = sum(p.numel() for p in net.parameters())
    print(f"{n / 1e9:.3f} B parameters: weights {4 * n / 1e9:.1f} GB in float32, "
          f"{2 * n / 1e9:.1f} GB in bfloat16; with gradients and AdamW {16 * n / 1e9:.1f} GB")
    for rank in (16, 64):
        size, trained = with_adapters(net, rank)
        print(f"--lora {rank}: {trained / 1e6:.1f} M trained, weights {size / 1e9:.1f} GB, with "
              f"gradients and AdamW {(size + 12 * trained) / 1e9:.1f} GB, a state of "
              f"{12 * trained / 1e9:.2f} GB")
    rows = dpo_rows(net.tokens, [[0] * net.tokens.image_tokens] * 3)
    settings = product((1, 4), ("float32", "bfloat16"), (False, True))
    for size, precision, checkpointing in settings:
        packs = [pack([row] * size, net.tokens.pad) for row in rows]
        labels = [int((p.targets != IGNORE).sum()) for p in packs]
        packs = [without_data(p, fake) for p in packs]
        net.checkpoint_activations(checkpointing)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        with fake, autocast:
            kept, flops = count(net, packs, labels)
        net.zero_grad()
        switch = "on " if checkpointing else "off"
        print(f"micro-batch {size}, {precision:8}, gradient checkpointing {switch}: activations "
              f"{kept / 1e9:6.1f} GB, {flops / size / 1e12:5.1f} TFLOP per record", flush=True)


if __name__ == "__main__":
    main()
