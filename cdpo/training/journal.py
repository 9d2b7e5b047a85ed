"""What a run writes down while it goes on: metrics and their copy, samples, histograms; and what a person sees of it.

Every rank has a journal, for the numbers are made by all of them; only the first rank's writes and talks.
"""

from __future__ import annotations

from typing import Any

from cdpo.system.files import write_csv
from cdpo.system.metrics import MetricsFile
from cdpo.system.progress import Heartbeat, Progress
from cdpo.training.evaluation import Evaluation, Samples
from cdpo.training.run import Run

SHOWN = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}  # beside the bar


class Journal:
    """Opens the files of a run, cut back to step `saved`, and adds to them. Within the block the bar is shown."""

    def __init__(self, run: Run, saved: int) -> None:
        self.run, self.directory, self.logger = run, run.directory, run.session.spec.logger
        self.writes = run.ranks.first
        self.bar = Progress(run.plan.steps, run.state.step, run.directory.path.name, quiet=not self.writes)
        if self.writes:
            self.heartbeat = Heartbeat(self.directory.progress, run.plan.steps, run.state.step)
            self.metrics = MetricsFile(self.directory.metrics)
            copied, task = self.metrics.truncate(saved), run.session.task
            self.logger.start(self.directory.path, task.composed, task.sweep and task.sweep.name, after=copied)
            for extra in (self.directory.samples, self.directory.histograms):
                if extra.is_file():
                    MetricsFile(extra).truncate(saved)

    def __enter__(self) -> Journal:
        self.bar.__enter__()
        return self

    def __exit__(self, *fault: object) -> None:
        self.bar.__exit__(*fault)

    def step(self) -> None:
        """A step is done: its row, if it is one of every `log_every`, and how far the run is."""
        state = self.run.state
        if state.step % self.run.trainer.log_every == 0:
            state.step_metrics |= self.run.data_rates | {"change/norm": self.run.change.norm()}
            self.record(state.step_metrics)
        if self.writes:
            self.heartbeat.beat(state.step)
        metrics = state.step_metrics
        self.bar.update(state.step, **{name: metrics[key] for name, key in SHOWN.items() if key in metrics})

    def evaluated(self, found: Evaluation) -> None:
        """An evaluation: its numbers, those of the constraints, histograms; at the end rows of prompts, candidates."""
        self.record(found.metrics | self._reports())
        if found.histograms:
            self._append(self.directory.histograms, found.histograms)
        if self.writes and self.run.ended and found.prompts:
            write_csv(self.directory.objective, found.prompts)
            write_csv(self.directory.candidates, found.candidates)

    def sampled(self, samples: Samples) -> None:
        """Sampled responses, and what they say of the policy's KL to the reference."""
        decode = self.run.tokenizer.decode
        for item, value in zip(samples.items, samples.log_ratio.tolist()):
            texts = {"prompt": decode(item.prompt), "response": decode(item.responses[0])}
            self._append(self.directory.samples, {"source": item.source, **texts, "log_ratio": value})
        self.record(samples.metrics())

    def record(self, row: dict[str, float]) -> None:
        """Remember the newest values, write them to metrics.jsonl, and hand a copy to the logger."""
        if not row:
            return
        self.run.state.latest |= row
        if self.writes:
            self.metrics.log({"step": self.run.state.step, **row})
            self.logger.log({"step": self.run.state.step, **row})

    def _reports(self) -> dict[str, float]:
        reports = {name: constraint.report() for name, constraint in self.run.constraints.items()}
        change = self.run.change
        reports |= {"all": {"trainable": change.trainable(), "distance": change.norm()}} if reports else {}
        return {f"constraint/{name}/{key}": value for name, found in reports.items() for key, value in found.items()}

    def _append(self, path: Any, row: dict[str, Any]) -> None:
        if self.writes:
            file = MetricsFile(path)
            file.log({"step": self.run.state.step, **row})
            file.close()
