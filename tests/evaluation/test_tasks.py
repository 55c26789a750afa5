"""lm-eval is an extra: the wiring is tested against a stand-in with the harness's own call signatures."""

from __future__ import annotations

import sys
import types

import pytest

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.tasks import run_tasks


def test_absent_harness_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match=r'pip install "llmsurgeon\[eval\]"'):
        run_tasks(None, None, ["arc_easy"])


@pytest.fixture
def harness(monkeypatch):
    calls = {}

    class TaskManager:
        all_tasks = ["arc_easy", "piqa"]

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            calls["model"], calls["tokenizer"] = pretrained, tokenizer

    class EvaluationTracker:
        def __init__(self, output_path):
            self.output_path = output_path

        def save_results_aggregated(self, results):
            calls["saved"] = (self.output_path, results)

    def simple_evaluate(model, model_args, tasks, limit, task_manager, evaluation_tracker, log_samples):
        print("chatter")
        calls["tasks"], calls["limit"], calls["name"] = tasks, limit, model_args
        return {"results": {task: {"acc,none": 0.5} for task in tasks}}

    names = ("lm_eval", "lm_eval.loggers", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    modules = {name: types.ModuleType(name) for name in names}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    modules["lm_eval.loggers"].EvaluationTracker = EvaluationTracker
    modules["lm_eval.tasks"].TaskManager = TaskManager
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return calls


def test_results_come_back_and_stdout_stays_clean(harness, capsys):
    assert run_tasks("model", "tokenizer", ["piqa"], limit=3, name="a,b") == {"piqa": {"acc,none": 0.5}}
    assert harness == {
        "model": "model",
        "tokenizer": "tokenizer",
        "tasks": ["piqa"],
        "limit": 3,
        "name": "pretrained=a_b",
    }
    assert capsys.readouterr().out == ""


def test_the_harness_saves_its_own_file(harness, tmp_path):
    run_tasks("model", "tokenizer", ["piqa"], output=tmp_path / "results")
    assert harness["saved"] == (str(tmp_path / "results"), {"results": {"piqa": {"acc,none": 0.5}}})


def test_unknown_task(harness):
    with pytest.raises(SurgeryError, match="unknown task: arc_esay"):
        run_tasks("model", "tokenizer", ["piqa", "arc_esay"])
    assert "tasks" not in harness
