"""Save a packed model with its tokenizer and its model card, README.md as the Hugging Face hub shows it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kbit.checkpoints.config import KbitConfig
from kbit.checkpoints.packing import find_packed_report
from kbit.methods.report import QuantizationReport
from kbit.numerics.scale_formats import name_dtype

log = logging.getLogger(__name__)
_HEADER_LENGTH: Final = 8  # bytes at the beginning of a safetensors file that say how long its header is

_CARD: Final = """\
---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- kbit
- quantized
---

# {name}

{model} in {bits:.4g} bits per parameter of the {count} weight matrices that are packed ({quantized:,} of {parameters:,}
parameters), {megabytes:.2f} MB in all, {stored:.2f} MB as files. It was made by kbit {version} with:

{fields}

Its layers compute with the packed codes. It needs kbit:

    import kbit
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kbit.KbitConfig  # registers the format with transformers
    model = AutoModelForCausalLM.from_pretrained("{name}")
    tokenizer = AutoTokenizer.from_pretrained("{name}")

`model.dequantize()` gives a plain model. `kbit run model.name=FOLDER quant.bits=16` evaluates it. `kbit export` writes
it for other tools, where their formats can hold it exactly.
{measured}"""


def write_card(folder: Path, config: KbitConfig, report: QuantizationReport, measured: str = "") -> None:
    """Write README.md into the folder of a packed checkpoint.

    Args:
        folder: the checkpoint's folder.
        config: how it is quantized.
        report: its count of bits.
        measured: a section with what was measured, in Markdown, or nothing.
    """
    model = config.made_by.get("model", "")
    is_hub = model.count("/") == 1 and not model.startswith((".", "/"))
    text = _CARD.format(
        base=f"base_model: {model}\nbase_model_relation: quantized\n" if is_hub else "",
        name=folder.resolve().name,
        model=Path(model).name if not is_hub else model,
        bits=report.bits_per_param,
        count=sum(tensor.quantized for tensor in report.tensors),
        quantized=report.quantized_parameters,
        parameters=report.parameters,
        megabytes=report.total_bits / 8e6,
        stored=sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
        version=config.made_by.get("kbit", ""),
        fields="\n".join(f"    {name}: {value}" for name, value in config.fields.items()),
        measured=f"\n## Measured\n\n{measured}\n" if measured else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def describe_bytes(total_bits: int, memory: int, folder: Path) -> str:
    """Return how many bytes a saved model takes in memory and as files, and how far that is from the bits counted.

    Memory has beyond them what total_bits leaves out: the codes and the places of columns at 16 bits, and half of each
    value of a tensor's own codebook. Files have a header, with a name and a shape for each tensor.
    """
    paths, counted = sorted(folder.glob("*.safetensors")), total_bits / 8
    stored = sum(path.stat().st_size for path in paths)
    headers = 0
    for path in paths:
        with path.open("rb") as file:
            headers += _HEADER_LENGTH + int.from_bytes(file.read(_HEADER_LENGTH), "little")
    return (
        f"{total_bits:,} bits counted in all; {memory:,} bytes in memory ({memory / counted - 1:+.2%}), "
        f"{stored:,} bytes of weight files ({stored / counted - 1:+.2%}), {headers:,} of them headers"
    )


def _say_width(model: PreTrainedModel) -> None:
    wide = [parameter for parameter in model.parameters() if parameter.is_floating_point() and parameter.itemsize > 2]
    if wide:
        log.warning(
            "%d tensors that are not packed are saved in %s, with %.1f MB: model.to(torch.float16) before "
            "saves them in 16 bits, as `kbit pack` does",
            len(wide), name_dtype(wide[0].dtype), sum(tensor.nbytes for tensor in wide) / 1e6,
        )  # fmt: skip


def save_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    made_of: str = "",
    measured: str = "",
    **options: Any,
) -> None:
    """Save a packed model with its tokenizer and a model card: what it is, how it was made, what was measured.

    Args:
        model: a model that pack_model packed, or that was loaded packed.
        tokenizer: its tokenizer.
        folder: the folder to write.
        made_of: the name of the model that was packed, for the card. Empty is what transformers knows of it.
        measured: a section of the card, in Markdown, with what was measured.
        options: more arguments of save_pretrained, such as max_shard_size.

    Tensors that are not packed are saved in the dtype that they have. It warns if that is more than 16 bits.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, KbitConfig):
        raise ValueError("the model is not packed: call kbit.pack_model first")
    _say_width(model)
    config.made_by |= {"model": made_of} if made_of else {}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    report = find_packed_report(model)
    assert report is not None  # as it is packed
    write_card(Path(folder), config, report, measured)
