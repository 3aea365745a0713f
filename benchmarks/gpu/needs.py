"""Say which packages the GPU day lacks here: exit code 1 if any. wheels.sh NAME ... prepares them where pip works."""

from __future__ import annotations

import importlib.util
import sys

# what is imported, and the package that has it
NEEDS = {
    "torch": "torch", "transformers": "transformers", "numba": "numba", "numba_cuda": "numba-cuda", "numpy": "numpy",
    "scipy": "scipy", "pandas": "pandas", "pyarrow": "pyarrow", "safetensors": "safetensors",
    "accelerate": "accelerate", "matplotlib": "matplotlib", "yaml": "pyyaml", "jinja2": "jinja2", "tqdm": "tqdm",
    "fsspec": "fsspec", "hydra": "hydra-core", "omegaconf": "omegaconf", "antlr4": "antlr4-python3-runtime",
    "jaxtyping": "jaxtyping", "wadler_lindig": "wadler-lindig", "lm_eval": "lm-eval", "datasets": "datasets",
    "dill": "dill", "multiprocess": "multiprocess", "xxhash": "xxhash", "requests": "requests",
    "urllib3": "urllib3", "charset_normalizer": "charset-normalizer", "certifi": "certifi", "sacrebleu": "sacrebleu",
    "portalocker": "portalocker", "tabulate": "tabulate", "colorama": "colorama", "lxml": "lxml",
}  # fmt: skip


def main() -> int:
    """Print the missing packages."""
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"missing here: {' '.join(missing)}\nwhere pip works: benchmarks/gpu/wheels.sh {' '.join(missing)}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
