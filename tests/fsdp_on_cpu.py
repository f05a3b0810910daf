"""Run a stage sharded over CPU processes: python tests/fsdp_on_cpu.py STAGE ARGUMENTS, under torchrun.

accelerate turns FSDP on for accelerators only; here the CPU's process group passes for one, with bench/fsdp.yaml's settings.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
for line in (ROOT / "bench" / "fsdp.yaml").read_text().splitlines():
    if line.startswith("  fsdp_"):
        key, value = line.split("#")[0].strip().split(": ")
        key = {"FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP"}.get(key.upper(), key.upper())
        os.environ[key] = value.strip()
os.environ["ACCELERATE_USE_FSDP"] = "true"

from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
sys.path.insert(0, str(ROOT))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
