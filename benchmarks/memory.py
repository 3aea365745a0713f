"""Memory of models at four precisions: measured in processes of their own, beside the formula of `kbit fit`.

    python benchmarks/memory.py [--models nano-neox-1m nano-neox-3m smollm2-135m] [--bits 16 8 4 3] [--batch 1]

Each model is loaded, packed below 16 bits, and generates: a prompt of 56 tokens, then 8 steps, in bfloat16. Two
measurements are taken in its process. One is kbit's own (eval.speed): the weights' bytes, and the most that torch had
allocated beside them. The other knows nothing of torch: the growth of the process's anonymous memory (RssAnon), read by
a thread every 2 ms, from before the model is loaded, with all libraries imported and kernels compiled. It has what the
allocator keeps, and the stacks of threads. SmolLM2-135M is its shape with random weights, as memory does not depend on
values. Writes benchmarks/results/memory.json, in which rows that are not measured again stay. Exit code 1: kbit's
measurement differs from the formula by more than 5%.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

RECORD: Final = Path(__file__).parent / "results" / "memory.json"
ALLOWED: Final = 0.05
PROMPT, NEW = 56, 8
SMOLLM2: Final = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def read_anonymous() -> int:
    """Return the bytes of this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def write_smollm2(folder: Path) -> None:
    """Write a checkpoint of SmolLM2-135M's shape with random weights and the tokenizer of an embedded model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from kbit.models.catalog import locate_model

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate_model("nano-neox-98k")).save_pretrained(folder)


def measure(name: str, bits: int, batch: int) -> dict[str, Any]:
    """Return what one model takes, in this process."""
    import torch

    from kbit.checkpoints.loading import load_model
    from kbit.costs.memory import Use, count_memory
    from kbit.costs.shapes import find_shape
    from kbit.evaluation.speed.generation import Workload, generate, measure_allocated
    from kbit.evaluation.speed.weights import count_held_bytes
    from kbit.methods.config import QuantConfig

    torch.set_num_threads(1)
    quant, small = QuantConfig(bits=bits), Workload(1, 4, 2)
    packed = None if quant.is_baseline else quant
    warm = load_model("nano-neox-98k", dtype="bfloat16", packed_as=packed).model  # compiles or loads the kernels
    generate(warm, small, small.draw_tokens(warm), float)
    del warm
    trim()
    before = read_anonymous()
    model = load_model(name, dtype="bfloat16", packed_as=packed).model
    trim()
    loaded = read_anonymous() - before
    work, peak, ended = Workload(batch, PROMPT, NEW), [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], read_anonymous() - before)

    watch = threading.Thread(target=look)
    watch.start()
    generate(model, work, work.draw_tokens(model), float)
    ended.set()
    watch.join()
    formula = count_memory(find_shape(name), quant, Use(context=PROMPT + NEW, batch=batch))
    return {
        "bits": bits, "batch": batch, "prompt": PROMPT, "new": NEW,
        "formula_weights": formula.weights, "formula_total": formula.total,
        "weights": count_held_bytes(model), "peak": count_held_bytes(model) + measure_allocated(model, work),
        "process_loaded": loaded, "process_peak": peak[0],
    }  # fmt: skip


def trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def run(name: str, folder: str, bits: int, batch: int) -> dict[str, Any]:
    """Return what one model takes, in a process of its own."""
    arguments = json.dumps([folder, bits, batch])
    done = subprocess.run(
        [sys.executable, __file__, "--measure", arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {"model": name, **json.loads(done.stdout.splitlines()[-1])}


def record(rows: list[dict[str, Any]]) -> None:
    """Write the rows in the place of those of the same model, bits and batch."""
    before = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
    by_case = {(row["model"], row["bits"], row["batch"]): row for row in [*before, *rows]}
    RECORD.write_text(json.dumps({"rows": list(by_case.values())}, indent=1) + "\n")


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano-neox-1m", "nano-neox-3m", "smollm2-135m"])
    parser.add_argument("--bits", nargs="+", type=int, default=[16, 8, 4, 3])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name in options.models:
            folder = name
            if name == "smollm2-135m":
                folder = f"{place}/{name}"
                write_smollm2(Path(folder))
            for bits in options.bits:
                row = run(name, folder, bits, options.batch)
                rows.append(row)
                print(
                    f"{name:14} {bits:2}-bit  formula {row['formula_total'] / 1e6:8.2f} MB  measured "
                    f"{row['peak'] / row['formula_total']:.3f} of it  process {row['process_peak'] / 1e6:8.2f} MB",
                    flush=True,
                )
    record(rows)
    wrong = [row for row in rows if abs(row["peak"] / row["formula_total"] - 1) > ALLOWED]
    if wrong:
        sys.exit("\n".join(f"{row['model']} at {row['bits']} bits is beyond {ALLOWED:.0%}" for row in wrong))


if __name__ == "__main__":
    main()
