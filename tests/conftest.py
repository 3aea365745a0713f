"""Shared by all tests: no network, one thread for each of torch and numba (models here are tiny), quiet libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "3")  # the most that a test can ask for

# A busy machine takes any time for an example, and no test asserts how long.
hypothesis.settings.register_profile("kbit", deadline=None)
hypothesis.settings.load_profile("kbit")

# The files that take longest, as they start processes, train or compile. They go first: at the end of the suite the
# processes of `make test` then share out short files, and none waits for another.
LONG: Final = (
    *("test_packaging", "test_notebooks", "test_main", "test_chaos", "test_compose", "test_interrupt", "test_presets"),
    *("test_cuda_ptx", "test_quantizer", "test_train", "test_shipped", "test_cuda", "test_ray_cluster", "test_doctor"),
    *("test_scorer", "test_codes", "test_registry", "test_cache"),
)

# Two layers, hidden size 64, four heads, a context of 256 tokens: (configuration class, its own names for them).
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": (
        "GPTNeoXConfig",
        {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 256},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "openai": ("OpenAIGPTConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": (
        "OPTConfig",
        {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "max_position_embeddings": 256},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 256}),
    "llama": (
        "LlamaConfig",
        {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 256},
    ),
    "mixtral": (
        "MixtralConfig",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 256},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
        | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256},
    ),
}
_LLAMA_LIKE: Final = ("mistral", "qwen2", "qwen3", "olmo2", "phi", "gemma2")
_CLASSES: Final = ("MistralConfig", "Qwen2Config", "Qwen3Config", "Olmo2Config", "PhiConfig", "Gemma2Config")
TINY |= {
    name: (config, TINY["llama"][1] | {"num_key_value_heads": 4})
    for name, config in zip(_LLAMA_LIKE, _CLASSES, strict=True)
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, in the order of LONG. Refuse names that differ from process to process."""
    if unstable := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"{unstable[0][:200]}: a test's name holds an address; give ids=")
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what quant.allocation measures out of the user's cache."""
    os.environ["KBIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., Any]:
    """Build a new random model of an architecture from its configuration: the same weights for the same seed.

    build_tiny("llama", vocab_size=259, seed=0, **more fields of the configuration) -> PreTrainedModel
    """
    import torch
    import transformers

    def build(architecture: str, *, vocab_size: int = 259, seed: int = 0, **fields: Any) -> Any:
        class_name, sizes = TINY[architecture]
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        config = getattr(transformers, class_name)(vocab_size=vocab_size, **(sizes | special | fields))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            return model.eval()

    return build


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the nano models: byte-level BPE, 1,024 tokens, <|endoftext|> = 0."""
    import transformers

    from kbit.models.catalog import locate_model

    return transformers.AutoTokenizer.from_pretrained(locate_model("nano-neox-98k"))


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def run_kbit() -> Callable[..., Done]:
    """Run the console script in a process of its own: (*arguments, cwd=folder, without=names of the environment)."""

    def run(*arguments: str, cwd: Path, without: Sequence[str] = ()) -> Done:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", *without)}
        command = [str(Path(sys.executable).with_name("kbit")), *arguments]
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def kbit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Done]]:
    """Run `kbit ...` in this process, which has torch loaded, from an empty folder: (*arguments)."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra_state import config_store_kept

    from kbit.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        assert not GlobalHydra.instance().is_initialized()
        monkeypatch.setattr(sys, "argv", ["kbit", *arguments])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = _exit_code(error)
        finally:
            GlobalHydra.instance().clear()  # else the next call is refused
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    with config_store_kept():
        yield run


def _exit_code(error: SystemExit) -> int:
    """What the interpreter makes of it: a text goes to stderr and is a 1."""
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
        return 1
    return error.code or 0
