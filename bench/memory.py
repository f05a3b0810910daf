"""Memory and work of training Show-o's 1.448 B parameters, counted on tensors without data: no GPU, a minute.

    python bench/memory.py

One Pair-DPO micro-batch through the stage's own packing and model. Activations: every tensor that autograd saves, once.
Parameters, gradients and AdamW's two moments are float32 in all settings (autocast casts a copy of the weights per step).
"""

import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent))
import bench  # noqa: E402
from model import IGNORE, Showo, pack  # noqa: E402


def saved_bytes(model, packs, labels) -> tuple[int, int]:
    """Bytes that the forward pass keeps for backward, parameters left out; and its FLOP, forward and backward."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with bench.counter() as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            total = 0.0
            for p, count in zip(packs, labels):
                hidden = model.hidden(p["ids"], p["positions"], layout=p["layout"])
                total = total + model.label_logprobs(hidden.flatten(0, 1)[:count], p["ids"].flatten()[:count],
                                                      model.showo.lm_head).sum()
        total.backward()
    return sum(n for n, _ in kept.values()), flops.get_total_flops()


def main():
    empty = bench.empty_model("1.3b")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = Showo(empty.config, empty.showo.config, empty.tokens)
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e9:.3f} B parameters: weights {4 * n / 1e9:.1f} GB in float32, {2 * n / 1e9:.1f} GB in bfloat16; "
          f"with gradients and AdamW {16 * n / 1e9:.1f} GB")
    rows = bench.dpo_rows(model.tokens, [[0] * 1024] * 3)
    for size in (1, 4):
        for precision in ("float32", "bfloat16"):
            for checkpointing in (False, True):
                packs = [pack([row] * size, model.tokens.pad) for row in rows]
                labels = [int((p["targets"] != IGNORE).sum()) for p in packs]
                with fake:
                    packs = [{k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in p.items()}
                             for p in packs]
                    model.train()
                    (model.showo.gradient_checkpointing_enable if checkpointing
                     else model.showo.gradient_checkpointing_disable)()
                    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                        kept, flops = saved_bytes(model, packs, labels)
                    model.zero_grad()
                print(f"micro-batch {size}, {precision:8}, gradient checkpointing {'on ' if checkpointing else 'off'}: "
                      f"activations {kept / 1e9:6.1f} GB, {flops / size / 1e12:5.1f} TFLOP per record", flush=True)


if __name__ == "__main__":
    main()
