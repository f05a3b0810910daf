"""Run a stage sharded over CPU processes: torchrun … tests/fsdp_on_cpu.py STAGE ARGUMENTS.

accelerate turns FSDP on for accelerators only. Here the CPU's process group passes for one, with
the settings of configs/fsdp.yaml.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# what `accelerate launch --config_file` sets
for line in (ROOT / "configs" / "fsdp.yaml").read_text().splitlines():
    if line.startswith("  fsdp_"):
        setting, _, _ = line.partition("#")
        name, value = setting.strip().split(": ")
        os.environ[name.upper()] = value.strip()
os.environ["ACCELERATE_USE_FSDP"] = "true"

sys.path.insert(0, str(ROOT))
from accelerate import PartialState
from accelerate.utils import DistributedType

from hermesflow.runs import PATIENCE

PartialState(cpu=True, timeout=PATIENCE)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
