"""What loading takes: a model quantized and packed while it is read, and the packed checkpoint read again.

    python benchmarks/packed_loading.py [--hidden 2048] [--layers 10] [--vocabulary 16000] [--bits 3]

A synthetic Llama checkpoint of float16 weights in shards is written (about 1 GB by default). Each way of loading it
runs in a process of its own, and a thread there watches RssAnon, the process's anonymous memory: pages of files that
are mapped can be dropped at any time, so that they are not counted. Reported is the peak beyond what the process had
before, with everything imported. The peak must stay below the packed model, its two largest tensors in float16 and 64
MB, and reloading below 64 MB and a tenth of the time. Exit code 1: it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

RECORD: Final = Path(__file__).parent / "results" / "packed_loading.json"
MEBIBYTE: Final = 2**20
ALLOWED: Final = 64 * 10**6  # bytes beside the model
PACKED, RELOADED, PLAIN = "packed while loading", "packed checkpoint", "plain, float16"


def read_anonymous() -> int:
    """Return the bytes of this process's anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon")


class Watch:
    """Measures a block's seconds and its peak of anonymous memory beyond what there was before."""

    def __enter__(self) -> Watch:
        self._before, self.peak, self._ended = read_anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.peak = max(self.peak, read_anonymous() - self._before)


def write_checkpoint(folder: Path, options: argparse.Namespace) -> None:
    """Write a checkpoint of random float16 weights, shard by shard."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=options.vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.float16)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="200MB")


def load(way: str, plain: str, packed: str, bits: int) -> dict[str, Any]:
    """Load in one way, in this process. The first way writes the packed checkpoint, too."""
    import torch
    from transformers import AutoModelForCausalLM

    from kbit.checkpoints.loading import KbitConfig
    from kbit.numerics.quantizer import quantize
    from kbit.numerics.spec import QuantSpec

    quantize(torch.randn(4, 64).half(), QuantSpec(bits=bits)).dequantize()  # compiles or loads the kernels
    # None would take the place of what config.json says, and packed weights would be read as plain ones
    asked = {"quantization_config": KbitConfig(bits=bits, data_type="nf")} if way == PACKED else {}
    with Watch() as watch:
        model = AutoModelForCausalLM.from_pretrained(packed if way == RELOADED else plain, dtype=torch.float16, **asked)
    if way == PACKED:
        model.save_pretrained(packed)
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values())
    return {"way": way, "seconds": round(watch.seconds, 2), "peak_bytes": watch.peak, "model_bytes": size}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return what each way took, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder) / "plain", Path(folder) / "packed"
        write_checkpoint(plain, options)
        files = sum(path.stat().st_size for path in plain.glob("*.safetensors"))
        rows = []
        for way in (PACKED, RELOADED, PLAIN):
            arguments: list[Any] = [way, str(plain), str(packed), options.bits]
            done = subprocess.run(
                [sys.executable, __file__, "--load", json.dumps(arguments)], capture_output=True, text=True,
                check=False, env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        stored = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    largest = max(4 * options.hidden * options.hidden, options.hidden * options.vocabulary) * 2
    return {
        "checkpoint_bytes": files, "packed_file_bytes": stored, "largest_tensor_bytes": largest, "bits": options.bits,
        "ways": rows,
    }  # fmt: skip


def judge(found: dict[str, Any]) -> list[str]:
    """Return what is beyond the bounds that the module's text states."""
    packed, reloaded = found["ways"][:2]
    wrong = []
    if packed["peak_bytes"] > packed["model_bytes"] + 2 * found["largest_tensor_bytes"] + ALLOWED:
        wrong.append(f"packing while loading: {packed['peak_bytes'] / 1e6:.0f} MB at its peak")
    if reloaded["peak_bytes"] > ALLOWED:
        wrong.append(f"reloading: {reloaded['peak_bytes'] / 1e6:.0f} MB at its peak")
    if reloaded["seconds"] > packed["seconds"] / 10:
        wrong.append(f"reloading: {reloaded['seconds']} s, and packing took {packed['seconds']} s")
    return wrong


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 2048), ("layers", 10), ("vocabulary", 16000), ("bits", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--load", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(*options.load)))
        return
    found = measure(options)
    for row in found["ways"]:
        print(f"{row['way']:22} {row['seconds']:8.2f} s  peak {row['peak_bytes'] / 1e6:8.1f} MB  model "
              f"{row['model_bytes'] / 1e6:8.1f} MB")  # fmt: skip
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    if wrong := judge(found):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
