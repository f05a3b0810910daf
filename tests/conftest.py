import importlib.util
import os
import sys
from pathlib import Path

# as in the processes that tests start: another number of threads rounds pictures otherwise
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.kills import tree  # noqa: E402

GOLDEN = Path(os.environ.get("GOLDEN", ROOT / "tests" / "golden"))


def stage(name: str):
    """A stage script, whose file name starts with a digit, loaded by its path for its tests."""
    spec = importlib.util.spec_from_file_location(f"stage_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def results_of(folder) -> dict[str, str]:
    """Digests of all that a stage writes, without its settings, which know the code."""
    return tree(folder, but=["settings.json"])


def main(module, *arguments):
    """Run a stage's main() as the command line would."""
    module.main(module.parse_args([str(a) for a in arguments]))
