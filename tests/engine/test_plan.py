"""What a user is told of a plan before anything runs."""

from __future__ import annotations

from pathlib import Path

from kbit.data.task_files import EMBEDDED_TASKS, list_definitions
from kbit.engine.plan import list_own_code
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import RunConfig

OWN_CODE = "process_docs: !function utils.process\n"


def test_code_of_ones_own_is_told_of_the_tasks_asked_for(tmp_path: Path) -> None:
    files = {
        "asked.yaml": f"task: asked\n{OWN_CODE}",
        "other.yaml": f"task: other\n{OWN_CODE}",
        "plain.yaml": "task: plain\ntag: [mine]\ninclude: base.yaml\n",
        "base.yaml": OWN_CODE,
        "group.yaml": "group: ours\ntask: [{task: asked, num_fewshot: 1}, nano_cloze, piqa]\n",
        "inner.yaml": f"group: outer\ntask: [ours, {{task: new, dataset_path: json}}]\n{OWN_CODE}",
        "by_group.yaml": "group: far\ntask: [{group: ours, num_fewshot: 1}]\n",
        "within.yaml": "group: nest\ntask:\n- {group: new, task: [plain, {group: newer, task: [{task: asked}]}]}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def told(*tasks: str) -> list[str]:
        evaluation = EvalConfig(tasks=tasks, task_path=str(tmp_path))
        return [str(Path(path).relative_to(tmp_path)) for path in list_own_code([RunConfig(eval=evaluation)])]

    assert told("nano_cloze") == []
    assert told("asked", "nano_cloze") == ["asked.yaml"]
    assert told("plain") == told("mine") == ["base.yaml"]
    assert told("ours") == ["asked.yaml"]
    assert told("outer") == ["asked.yaml", "inner.yaml"]
    assert told("far") == ["asked.yaml"]
    assert told("nest") == ["asked.yaml", "base.yaml"]
    assert list_own_code([RunConfig()]) == []
    assert list_definitions(["ours"], str(tmp_path)) == sorted(
        [
            tmp_path / "asked.yaml",
            tmp_path / "group.yaml",
            *EMBEDDED_TASKS.glob("nano_cloze.yaml"),
            EMBEDDED_TASKS / "piqa.yaml",
        ]
    )
