"""kbit: k-bit inference scaling laws.

For a given number of model bits, which precision, data type, block size and quantization method give the best language
model? kbit quantizes tensors and models, evaluates them, and reads the results of sweeps back:

    spec = kbit.QuantSpec(bits=4, data_type="nf", block_size=64)
    kbit.fake_quantize(x, spec)
    loaded = kbit.load_model("nano-neox-98k")
    kbit.quantize_model(loaded.model, spec)
    kbit.evaluate(loaded.model, loaded.tokenizer, ["nano_cloze"])
    kbit.read_results("results")
    kbit.compare("nano-neox-98k", ["nf4", "int4", "mxfp4"])
    kbit.figures.draw("figure_2", "results", width="3.3in")

Names are imported on first use, so that `import kbit` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbit import figures as figures
    from kbit import optim as optim
    from kbit.analysis.statistics.recommendation import recommend as recommend
    from kbit.checkpoints.foreign import read_quantized as read_quantized
    from kbit.checkpoints.loading import KbitConfig as KbitConfig
    from kbit.checkpoints.loading import load_model as load_model
    from kbit.checkpoints.loading import pack_model as pack_model
    from kbit.checkpoints.saving import save_packed as save_packed
    from kbit.evaluation.zero_shot import evaluate as evaluate
    from kbit.experiments.config import Experiment as Experiment
    from kbit.experiments.session import run_experiment as run_experiment
    from kbit.layers.peft_private import adapt_packed_layers as adapt_packed_layers
    from kbit.methods.allocation.config import AllocationConfig as AllocationConfig
    from kbit.methods.config import QuantConfig as QuantConfig
    from kbit.methods.quantize_model import allocate_bits as allocate_bits
    from kbit.methods.quantize_model import quantize_model as quantize_model
    from kbit.notebook.comparison import compare as compare
    from kbit.notebook.drawing import plot as plot
    from kbit.notebook.drawing import plot_codebooks as plot_codebooks
    from kbit.notebook.quantizers import error_table as error_table
    from kbit.notebook.quantizers import list_matrices as list_matrices
    from kbit.notebook.quantizers import presets as presets
    from kbit.numerics.quantized_tensor import QuantizedTensor as QuantizedTensor
    from kbit.numerics.quantizer import codebook as codebook
    from kbit.numerics.quantizer import dequantize as dequantize
    from kbit.numerics.quantizer import fake_quantize as fake_quantize
    from kbit.numerics.quantizer import quantize as quantize
    from kbit.numerics.spec import QuantSpec as QuantSpec
    from kbit.store.readers import read_failures as read_failures
    from kbit.store.readers import read_results as read_results

    __version__: str

# Each public name, and the module that defines it, or that it is. `kbit.quantize` and `kbit.evaluate` are functions.
_PUBLIC = {
    "AllocationConfig": "kbit.methods.allocation.config:AllocationConfig",
    "Experiment": "kbit.experiments.config:Experiment",
    "QuantConfig": "kbit.methods.config:QuantConfig",
    "QuantSpec": "kbit.numerics.spec:QuantSpec",
    "QuantizedTensor": "kbit.numerics.quantized_tensor:QuantizedTensor",
    "allocate_bits": "kbit.methods.quantize_model:allocate_bits",
    "adapt_packed_layers": "kbit.layers.peft_private:adapt_packed_layers",
    "compare": "kbit.notebook.comparison:compare",
    "codebook": "kbit.numerics.quantizer:codebook",
    "dequantize": "kbit.numerics.quantizer:dequantize",
    "error_table": "kbit.notebook.quantizers:error_table",
    "evaluate": "kbit.evaluation.zero_shot:evaluate",
    "figures": "kbit.figures:",
    "fake_quantize": "kbit.numerics.quantizer:fake_quantize",
    "KbitConfig": "kbit.checkpoints.loading:KbitConfig",
    "list_matrices": "kbit.notebook.quantizers:list_matrices",
    "load_model": "kbit.checkpoints.loading:load_model",
    "optim": "kbit.optim:",
    "pack_model": "kbit.checkpoints.loading:pack_model",
    "plot": "kbit.notebook.drawing:plot",
    "plot_codebooks": "kbit.notebook.drawing:plot_codebooks",
    "presets": "kbit.notebook.quantizers:presets",
    "quantize": "kbit.numerics.quantizer:quantize",
    "quantize_model": "kbit.methods.quantize_model:quantize_model",
    "read_failures": "kbit.store:read_failures",
    "read_quantized": "kbit.checkpoints.foreign:read_quantized",
    "read_results": "kbit.store:read_results",
    "save_packed": "kbit.checkpoints.saving:save_packed",
    "recommend": "kbit.analysis.statistics.recommendation:recommend",
    "run_experiment": "kbit.experiments.session:run_experiment",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from kbit.version import find_version  # takes a moment, which the command line need not wait for

        return find_version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kbit' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__
