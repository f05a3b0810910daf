import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
GOLDEN = Path(os.environ.get("GOLDEN", ROOT / "tests" / "golden"))


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN


def torchrun(processes: int, *arguments) -> list[str]:
    """The command that starts several gloo processes. (accelerate launch starts CPU processes through MPI only.)"""
    start = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*start, "--nproc-per-node", str(processes), *map(str, arguments)]


def stage(name: str):
    """Import a stage script, whose file name starts with a digit, as a module."""
    spec = importlib.util.spec_from_file_location(f"stage_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
