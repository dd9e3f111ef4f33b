"""The demo, from raw data to a page: ``make demo``, or ``python -m launch.local [--fast]``.

Every part picks up where it was: data and checkpoints are kept, a finished stage is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

TITLES = {
    "language": "stage 0, QLLaMA's decoder learns to write",
    "llm": "stage 0, the chat LLM learns to write",
    "contrastive": "stage 1, pictures and names meet (InternVL-C)",
    "generative": "stage 2, queries read the frozen tower (InternVL-G)",
    "projector": "stage 3a, projectors alone",
    "chat": "stage 3b, projectors and LLM (InternVL-Chat)",
}
EVALUATED = {"contrastive": "stage1", "generative": "stage2", "chat": "stage3"}


class Demo:
    """The parts of the demo over one folder."""

    def __init__(self, runs: pathlib.Path, data: pathlib.Path, fast: bool):
        from configs import demo

        self.runs, self.data, self.fast, self.config = runs, data, fast, demo
        self.seconds: dict[str, float] = self._read("seconds.json", {})

    def run(self) -> int:
        """Everything, in order; returns the exit code."""
        with self._part("data"):
            from data_pipelines.build import build

            build("emoji", str(self.data), report=lambda line: print(f"  {line}", flush=True))
            self._tokenizer()
        for stage in self.config.STAGES:
            if code := self._train(stage):
                return code
            if stage in EVALUATED:
                self._evaluate(stage)
        self._export()
        self._report()
        return 0

    def _tokenizer(self) -> None:
        from data_pipelines import text
        from data_pipelines.corpus import make_corpus
        from data_pipelines.datasets import open_dataset

        path = self.runs / "tokenizer.model"
        if not path.exists():
            concepts = open_dataset("emoji", self.data).training_concepts()
            corpus = make_corpus(concepts, self.config.LANGUAGES)
            text.train(corpus, path, vocab_size=self.config.VOCAB)
            print(f"  tokenizer of {self.config.VOCAB} ids from {len(corpus)} texts")

    def _train(self, stage: str) -> int:
        from internvl_jax.train.experiment import resolve
        from internvl_jax.train.loop import train

        with self._part(stage):
            return train(resolve(self._settings(stage)), str(self.runs / stage), title=stage)

    def _settings(self, stage: str) -> Any:
        config = self.config.get_config(f"{stage},fast" if self.fast else stage)
        config.data.data_dir = str(self.data)
        config.data.tokenizer = str(self.runs / "tokenizer.model")
        for source in config.get("init", {}).get("sources", ()):
            source["path"] = str(self.runs / pathlib.Path(source["path"]).name)
        return config

    def _evaluate(self, stage: str) -> None:
        """Judges a stage's model on the vendor that was never trained on; once per model."""
        from data_pipelines.text import Tokenizer
        from internvl_jax import pretrained
        from internvl_jax.evaluate import runner

        if (self.runs / stage / "evaluation.json").exists():
            return
        with self._part(f"{stage} judged"):
            trained, model, _ = pretrained.load(str(self.runs / stage))
            data = dict(self._settings(stage).data)
            tokenizer = Tokenizer(data["tokenizer"])
            limit = 64 if self.fast else None
            common: dict[str, Any] = dict(
                image_size=trained.image_size, languages=self.config.LANGUAGES
            )
            if stage == "contrastive":
                figures, examples = runner.evaluate_contrastive(
                    model, tokenizer, data, mode="C", text_length=trained.text_length, **common
                )
            elif stage == "generative":
                figures, examples = runner.evaluate_generative(
                    model,
                    tokenizer,
                    data,
                    text_length=trained.text_length,
                    caption_limit=limit or 128,
                    **common,
                )
            else:
                figures, examples = runner.evaluate_chat(
                    model, tokenizer, data, limit=limit or 100, **common
                )
            self._write(f"{stage}/evaluation.json", {"figures": figures, "examples": examples})

    def _export(self) -> None:
        """The stage-2 model under the official names, compared with transformers if it is there."""
        from internvl_jax.convert.to_torch import export_checkpoint

        folder = self.runs / "export"
        with self._part("export"):
            export_checkpoint(self.runs / "generative", folder, overwrite=True)
            difference = self._compare(folder)
        self._write("export.json", difference)

    def _compare(self, folder: pathlib.Path) -> dict[str, float]:
        from internvl_jax.convert import native

        if not native.available():
            print("  transformers is not installed: the export was not compared with it.")
            return {}
        import numpy as np

        from data_pipelines.evaluation import gallery
        from internvl_jax.models.intern_vit import normalize_images

        data = dict(self._settings("generative").data, image_size=self.config.IMAGE_SIZE)
        pictures = gallery(data, split="held_out", which="judged").images[:16]
        worst = native.check_vision_with_transformers(
            folder, np.asarray(normalize_images(pictures))
        )
        print(f"  transformers' InternVLVisionModel differs by at most {worst:.1e}.")
        return {"export.transformers_max_abs_difference": worst}

    def _report(self) -> None:
        """``metrics.json`` with every figure, and the page."""
        from internvl_jax.evaluate.report import write_report
        from internvl_jax.evaluate.report.demo import demo_report, minutes, read_curve

        figures: dict[str, float] = {}
        examples: dict[str, Any] = {}
        for stage, name in EVALUATED.items():
            judged = self._read(f"{stage}/evaluation.json", {})
            figures |= {f"{name}.{key}": value for key, value in judged["figures"].items()}
            examples[name] = judged["examples"]
        figures |= self._read("export.json", {})
        figures |= {f"seconds.{part}": value for part, value in self.seconds.items()}
        self._write("metrics.json", figures)

        attribution = next(self.data.glob("emoji/*/ATTRIBUTION.md")).read_text("utf-8")
        total = minutes(sum(self.seconds.values()))
        page = write_report(
            self.runs / "report.html",
            demo_report(
                figures,
                examples,
                curves=[
                    read_curve(str(self.runs / stage), TITLES[stage])
                    for stage in self.config.STAGES
                ],
                facts={"duration": total, "device": device()},
                training=(
                    "Three vendors' emoji drawings and their names in "
                    f"{len(self.config.LANGUAGES)} languages, {total} on {device()}: data, "
                    "training, judging and export together."
                ),
                commands=self._commands(),
                attribution=attribution,
                languages=self.config.LANGUAGES,
            ),
        )
        print(f"\nFigures: {self.runs}/metrics.json\nPage:    {page}\nWeights: {self.runs}/export")

    def _commands(self) -> list[tuple[str, str]]:
        fast = ",fast" if self.fast else ""
        lines = [("the data", f"python -m data_pipelines.build emoji --data_dir {self.data}")]
        for stage in self.config.STAGES:
            command = (
                f"python -m internvl_jax.train --config=configs/demo.py:{stage}{fast} "
                f"--workdir={self.runs / stage}"
            )
            lines.append((TITLES[stage], command))
        lines.append(
            (
                "PyTorch weights",
                f"python -m internvl_jax.convert export {self.runs}/generative {self.runs}/export",
            )
        )
        return lines

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """A heading, and the seconds a part took over all its attempts."""
        print(f"\n== {TITLES.get(name, name)}", flush=True)
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            self._write("seconds.json", self.seconds)

    def _read(self, name: str, default: Any) -> Any:
        path = self.runs / name
        return json.loads(path.read_text("utf-8")) if path.exists() else default

    def _write(self, name: str, value: Any) -> None:
        path = self.runs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")
        new.replace(path)


def device() -> str:
    """What this runs on, in words."""
    import os

    import jax

    first = jax.devices()[0]
    if first.platform == "cpu":
        return f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{jax.device_count()} × {first.device_kind}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 75 stopped and saved, 78 not possible."""
    parser = argparse.ArgumentParser(prog="python -m launch.local", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a glance: a tenth of the steps")
    parser.add_argument("--runs", type=pathlib.Path, help="where to (default: runs/demo[_fast])")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data"))
    options = parser.parse_args(arguments)
    runs = options.runs or pathlib.Path("runs/demo_fast" if options.fast else "runs/demo")

    import jax

    jax.config.update("jax_compilation_cache_dir", str((runs / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        return Demo(runs, options.data, options.fast).run()
    except KeyboardInterrupt:
        print("\nStopped: the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 78


if __name__ == "__main__":
    sys.exit(main())
