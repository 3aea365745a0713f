"""Save a packed model with its tokenizer and its model card, README.md as the Hugging Face hub shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kbit.checkpoints.config import KbitConfig
from kbit.checkpoints.packing import find_packed_report
from kbit.methods.report import QuantizationReport

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
parameters), {megabytes:.1f} MB in all. It was made by kbit {version} with:

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
        version=config.made_by.get("kbit", ""),
        fields="\n".join(f"    {name}: {value}" for name, value in config.fields.items()),
        measured=f"\n## Measured\n\n{measured}\n" if measured else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


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
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, KbitConfig):
        raise ValueError("the model is not packed: call kbit.pack_model first")
    config.made_by |= {"model": made_of} if made_of else {}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    report = find_packed_report(model)
    assert report is not None  # as it is packed
    write_card(Path(folder), config, report, measured)
