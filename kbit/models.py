"""Load a language model, find the weights to quantize, and quantize them in place.

Quantized by default: every weight matrix inside the transformer blocks, that is nn.Linear, transformers' Conv1D (GPT-2;
blocked as the equivalent Linear) and fused 3-D expert weights. Not quantized: embeddings, lm_head, norms, biases.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from kbit.config import DTYPES
from kbit.datatypes import check_choice
from kbit.families import locate_model
from kbit.quantizer import fake_quantize_
from kbit.quiet import silence_libraries
from kbit.scales import check_scale_range
from kbit.spec import BASELINE_BITS, QuantSpec

log = logging.getLogger(__name__)

MIN_COVERAGE: Final = 0.9  # of the block matrices' parameters; less means the model's layers were not understood


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be quantized and evaluated.

    Attributes:
        model: in evaluation mode, on the asked device and in the asked dtype.
        tokenizer: of the same checkpoint.
        checkpoint_dtype: the 16-bit dtype that the weights were rounded to before they were cast to the asked dtype.
        revision: sha256 over the weight files for a local model, the hub commit otherwise.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint_dtype: str
    revision: str


@dataclass(frozen=True)
class TensorReport:
    """What happened to one tensor of the model, once per distinct storage.

    Attributes:
        name: the parameter's name; names of tied parameters are joined by " = ".
        shape: of the parameter.
        in_block: whether it is a weight matrix (2-D or more) inside a transformer block.
        quantized: whether it was quantized.
        reason: why not; empty if quantized.
        bits: bits that the tensor takes in the quantized model.
    """

    name: str
    shape: tuple[int, ...]
    in_block: bool
    quantized: bool
    reason: str
    bits: int


@dataclass(frozen=True)
class QuantizationReport:
    """Coverage and bit accounting of a quantized model (or of the baseline: nothing quantized, 16 bits each).

    Attributes:
        spec: the quantizer.
        tensors: every distinct tensor of the model.
        weight_rmse: relative error of all quantized weights together, sqrt(sum (w - w')^2 / sum w^2); 0 where nothing
            is quantized, None of a plan.
    """

    spec: QuantSpec
    tensors: tuple[TensorReport, ...]
    weight_rmse: float | None = field(default=None, compare=False)  # a plan is equal to the report of its execution

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return sum(_elements(t) for t in self.tensors)

    @property
    def quantized_parameters(self) -> int:
        """Parameters in quantized tensors."""
        return sum(_elements(t) for t in self.tensors if t.quantized)

    @property
    def total_bits(self) -> int:
        """Bits of the whole model: quantized tensors with their scales and codebooks, everything else at 16."""
        return sum(t.bits for t in self.tensors)

    @property
    def bits_per_param(self) -> float:
        """Bits per quantized parameter, scales and codebooks included; 16 where nothing is quantized."""
        quantized_bits = sum(t.bits for t in self.tensors if t.quantized)
        return quantized_bits / self.quantized_parameters if self.quantized_parameters else float(BASELINE_BITS)

    @property
    def coverage(self) -> float:
        """Share of the block matrices' parameters that is quantized; 0 for the baseline."""
        in_blocks = sum(_elements(t) for t in self.tensors if t.in_block)
        covered = sum(_elements(t) for t in self.tensors if t.in_block and t.quantized)
        return covered / in_blocks if in_blocks else 0.0


def load_model(name: str, *, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Load a model by short name, local folder or hub id: safetensors only, no remote code.

    The weights are first rounded to 16 bits (the checkpoint's dtype if it is one of 16 bits, float16 if it is float32),
    since the baseline of every curve is the 16-bit model, then cast to dtype, in which the model computes.

    Raises:
        ValueError: unknown name or dtype, or weights that are not finite.
        OSError: files that are missing, truncated or cannot be downloaded; the message names the model.
    """
    check_choice("model.dtype", dtype, DTYPES)
    check_device(device)
    silence_libraries()
    location = locate_model(name)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        loading: Any = AutoModelForCausalLM.from_pretrained(
            location, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # safetensors, tokenizers and transformers each raise types of their own here
        where = location if Path(location).is_dir() else f"{location} on the hub (there is no such folder here)"
        raise OSError(f"model {name!r} cannot be loaded from {where}: {error}") from error
    model, info = loading
    if not tokenizer("a b")["input_ids"]:  # transformers makes an empty one of a folder without tokenizer files
        raise OSError(f"model {name!r} at {location} has no usable tokenizer: its tokenizer files are missing")
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        raise OSError(f"model {name!r} at {location} lacks {len(missing)} tensors, such as {missing[0]}")
    checkpoint_dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    check_finite(model)
    module: nn.Module = model  # whose .to() transformers wraps in a way that type checkers misread
    for parameter in module.parameters():  # not buffers: rotary frequencies stay float32, as transformers keeps them
        parameter.data = parameter.data.to(checkpoint_dtype).to(getattr(torch, dtype))
    module.to(device=device).eval()
    check_finite(model)  # a float32 weight beyond 65504 is infinite as float16
    revision = hash_folder(Path(location)) if Path(location).is_dir() else str(config._commit_hash)
    return LoadedModel(model, tokenizer, str(checkpoint_dtype).removeprefix("torch."), revision)


def check_device(device: str) -> None:
    """Raise ValueError if the device is not there: kbit never falls back to another one."""
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and torch.cuda.device_count() <= index:
        raise ValueError(f"device={device}: there are {torch.cuda.device_count()} CUDA devices here; use device=cpu")


def quantize_model(
    model: nn.Module,
    spec: QuantSpec,
    *,
    include: str | None = None,
    exclude: str | None = None,
    min_coverage: float = MIN_COVERAGE,
) -> QuantizationReport:
    """Quantize the block matrices in place: each becomes dequantize(quantize(w)) in its own dtype.

    Args:
        model: any Hugging Face causal language model.
        spec: the quantizer; at 16 bits nothing changes and the report counts the baseline.
        include: regular expression; tensors whose name it finds are quantized too (such as "lm_head").
        exclude: regular expression; tensors whose name it finds are not quantized. It wins over include.
        min_coverage: least share of the block matrices' parameters that must be quantized.

    Raises:
        ValueError: the model is quantized already with another spec; coverage too low; a weight holds NaN or Inf, or is
            beyond scale_format's range; an include that finds nothing. The model is unchanged then.
    """
    asked = (spec.canonical(), include, exclude)
    if (done := _find_earlier_report(model, asked)) is not None:
        return done
    report = plan_quantization(model, spec, include=include, exclude=exclude)
    if not spec.is_baseline and report.coverage < min_coverage:
        raise ValueError(_describe_low_coverage(report, min_coverage))
    parameters = dict(model.named_parameters())
    check_finite(model)
    names = [tensor.name.split(" = ")[0] for tensor in report.tensors if tensor.quantized]
    for name in names:
        try:
            check_scale_range(float(parameters[name].detach().abs().max()), spec.scale_format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    lost = norm = 0.0
    for name in names:
        # tensors of one model must not share their random numbers
        own_seed = dataclasses.replace(spec, seed=spec.seed + zlib.crc32(name.encode()))
        norm += _sum_squares(parameters[name].detach())
        lost += _quantize_parameter(parameters[name], own_seed, transposed=_is_transposed(_owner(model, name)))
    report = dataclasses.replace(report, weight_rmse=math.sqrt(lost / norm) if norm else 0.0)
    if not spec.is_baseline:
        model.kbit_quantized = (asked, report)  # type: ignore[assignment]
    return report


def plan_quantization(
    model: nn.Module, spec: QuantSpec, *, include: str | None = None, exclude: str | None = None
) -> QuantizationReport:
    """Return the report that quantize_model would return, without touching the model (meta tensors will do)."""
    tensors = []
    for names, parameter in _distinct_parameters(model):
        owner = _owner(model, names[0])
        in_block = _is_in_block(names[0]) and parameter.ndim >= 2 and not isinstance(owner, nn.Embedding)
        reason = _why_not(names, parameter, owner, include, exclude)
        quantized = not reason and not spec.is_baseline
        blocked = parameter.transpose(-1, -2) if parameter.ndim >= 2 and _is_transposed(owner) else parameter
        bits = spec.count_bits(blocked.shape) if quantized else BASELINE_BITS * parameter.numel()
        reason = "16-bit baseline" if spec.is_baseline and not reason else reason
        tensors.append(TensorReport(" = ".join(names), tuple(parameter.shape), in_block, quantized, reason, bits))
    if include is not None and not any(re.search(include, n) for t in tensors for n in t.name.split(" = ")):
        raise ValueError(f"quant.include={include!r} finds none of the model's tensors")
    return QuantizationReport(spec, tuple(tensors))


def copy_weights(model: nn.Module, report: QuantizationReport) -> dict[str, torch.Tensor]:
    """Return CPU copies of the tensors that the report quantizes, to restore them between variants."""
    parameters = dict(model.named_parameters())
    names = [t.name.split(" = ")[0] for t in report.tensors if t.quantized]
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names}


def restore_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put the copies back and forget that the model was quantized."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    if hasattr(model, "kbit_quantized"):
        del model.kbit_quantized


def hash_weights(model: nn.Module) -> str:
    """Return one hash over every parameter's name, dtype and bytes: two equal hashes, two equal models."""
    digest = hashlib.blake2b(digest_size=16)
    for names, parameter in _distinct_parameters(model):
        digest.update(f"{names} {parameter.dtype} {tuple(parameter.shape)}".encode())
        data = parameter.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def hash_folder(folder: Path) -> str:
    """Return the sha256 over a local model's configuration, tokenizer and weight files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors"}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Raise ValueError if a parameter holds NaN or Inf, naming the first such tensor and the counts."""
    bad = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is a meta tensor: it holds no values; load the weights before quantizing")
        if count := int((~torch.isfinite(parameter.detach())).sum()):
            bad.append(f"{name} ({count} of {parameter.numel()} values)")
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise ValueError(f"NaN or Inf in weight {bad[0]}{more}")


def _find_earlier_report(model: nn.Module, asked: tuple[object, ...]) -> QuantizationReport | None:
    """Return the report of an earlier quantization with the same settings (and say so), None if there was none."""
    done: tuple[tuple[object, ...], QuantizationReport] | None = getattr(model, "kbit_quantized", None)
    if done is None:
        return None
    if done[0] != asked:
        raise ValueError(
            f"the model is already quantized with {done[0]} (spec, include, exclude), not {asked}: "
            "load it again, or restore its weights"
        )
    log.warning("the model is already quantized with this spec: nothing done")
    return done[1]


def _quantize_parameter(parameter: nn.Parameter, spec: QuantSpec, *, transposed: bool) -> float:
    """Replace a weight by its quantized values and return the sum of its squared errors.

    A weight stored as [in, out] is blocked like a Linear's [out, in].
    """
    weight = parameter.detach()
    before = weight.to(torch.float32, copy=True)
    fake_quantize_(weight.transpose(-1, -2) if transposed else weight, spec)
    return _sum_squares(weight.float() - before)


def _sum_squares(values: torch.Tensor) -> float:
    """Return the sum of the squared values, added up in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _distinct_parameters(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Yield every parameter once, with all its names: tied parameters are one."""
    names_of: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    for key, parameter in parameters.items():
        yield names_of[key], parameter


def _why_not(
    names: list[str], parameter: nn.Parameter, owner: nn.Module, include: str | None, exclude: str | None
) -> str:
    """Return why a tensor is not quantized, or an empty string if it is."""
    if exclude is not None and any(re.search(exclude, name) for name in names):
        return f"excluded by {exclude!r}"
    if include is not None and any(re.search(include, name) for name in names):
        return ""
    if not _is_in_block(names[0]):
        return "outside the transformer blocks"
    if parameter.ndim < 2:
        return "not a matrix (bias or norm)"
    is_convolution = isinstance(owner, _ConvNd)
    if isinstance(owner, nn.Linear | Conv1D) or (parameter.ndim == 3 and not is_convolution):  # 3-D: fused experts
        return ""
    return f"matrix of {type(owner).__name__}, which is neither a linear layer nor fused experts"


def _is_in_block(name: str) -> bool:
    """Whether a parameter belongs to a transformer block: a numbered member of a list such as layers or h."""
    return re.search(r"\.\d+\.", name) is not None


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a parameter belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def _is_transposed(owner: nn.Module) -> bool:
    """Whether the module stores its matrices as [..., in, out]: GPT-2's Conv1D, and experts that say so (GPT-OSS)."""
    return isinstance(owner, Conv1D) or bool(getattr(owner, "is_transposed", False))


def _describe_low_coverage(report: QuantizationReport, min_coverage: float) -> str:
    skipped = [t for t in report.tensors if t.in_block and not t.quantized]
    examples = "; ".join(f"{t.name} {list(t.shape)}: {t.reason}" for t in skipped[:3])
    return (
        f"only {report.coverage:.1%} of the block matrices' parameters would be quantized, "
        f"quant.min_coverage={min_coverage:g}; skipped {len(skipped)} tensors, such as {examples or 'none in a block'}"
    )


def _elements(tensor: TensorReport) -> int:
    return int(torch.Size(tensor.shape).numel())
