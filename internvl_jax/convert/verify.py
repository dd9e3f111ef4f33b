"""Parity is a command: our models against stored outputs of the official ones.

Every ``out/`` tensor of a folder (in cases of the later models: every tensor that is no input) is
computed by our model in float32 and compared. Tolerances:

* outputs and gradients: largest absolute error at most 1e-4 of the reference tensor's largest
  magnitude (an all-zero tensor: at most 1e-7); ``grad_loss`` of a vision case, a signed sum of
  thousands of terms, is judged by the root of the sum of their squares;
* ids, indices and masks (integers and booleans): equal, and infinities in the same places;
* the gradients of the attention pools' key biases (`NOISE`): both sides must be rounding noise, as
  they shift all keys alike, the softmax cancels them, and their true value is zero.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internvl_jax.convert.case import Arrays, Case, CaseError

TOLERANCE = 1e-4
ZERO = 1e-7
NOISE = re.compile(r"^grad\w*/.*(cross_attn\.k_bias|norm1_k\.bias)$")
NOISE_FLOOR = 1e-6

# The kinds of cases, and the function that computes them (imported when one is met).
KINDS = {
    "internvit": "verify_vision:internvit",
    "internvit_interp": "verify_vision:internvit_interp",
    "internvl_c": "verify_internvl:internvl_c",
    "internvl_c_pytorch": "verify_internvl:internvl_c",
    "internvl_g": "verify_internvl:internvl_g",
    "qllama_lm": "verify_internvl:qllama_lm",
    "stage2": "verify_losses:stage2",
    "stage2_2rank": "verify_losses:stage2_2rank",
    "chat": "verify_chat:chat",
    "hf_internvl": "verify_family:hf_internvl",
    "official_internvl_chat": "verify_family:official_internvl_chat",
}
# Stored outputs that are allowed to stay uncomputed: patterns of names, per kind. None so far.
NOT_COMPUTED: dict[str, Sequence[str]] = {}

PASS, FAIL = "ok", "FAIL"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One compared tensor.

    Attributes:
        name: without ``out/``.
        error: largest absolute difference; NaN if the shapes differ or something is not finite.
        relative: error over the reference tensor's largest magnitude.
        peak: that magnitude.
        verdict: ``ok``, or ``FAIL`` and why.
    """

    name: str
    error: float
    relative: float
    peak: float
    verdict: str

    @property
    def passed(self) -> bool:
        return self.verdict == PASS


@dataclasses.dataclass(frozen=True)
class Report:
    """All of one folder; `left_out` are stored outputs that were not computed and had to be."""

    folder: str
    kind: str
    compared: tuple[Comparison, ...]
    left_out: tuple[str, ...]
    excused: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.left_out and all(c.passed for c in self.compared)


def compare(
    name: str, ours: np.ndarray, reference: np.ndarray, scale: float | None = None
) -> Comparison:
    """Compares one tensor with its reference by the rules above.

    Args:
        name: decides whether it is one of `NOISE`.
        ours, reference: of any dtypes; the reference's decides whether they must be equal.
        scale: magnitude to judge by instead of the reference's largest.
    """

    def failed(why: str) -> Comparison:
        return Comparison(name, float("nan"), float("nan"), peak, f"{FAIL} ({why})")

    ours, reference = np.asarray(ours), np.asarray(reference)
    exact = reference.dtype.kind in "iub"
    finite = np.isfinite(reference.astype(np.float64))
    values = reference.astype(np.float64)
    peak = float(np.max(np.abs(values[finite]), initial=0.0)) if scale is None else scale
    if ours.shape != reference.shape:
        return failed(f"shape {list(ours.shape)}, should be {list(reference.shape)}")
    mine = ours.astype(np.float64)
    if np.isnan(mine).any():
        return failed("NaN")
    if not np.array_equal(mine[~finite], values[~finite]) or not np.isfinite(mine[finite]).all():
        return failed("infinities elsewhere")
    error = float(np.max(np.abs(mine[finite] - values[finite]), initial=0.0))
    relative = error / peak if peak else (0.0 if error == 0 else float("inf"))
    if exact:
        wrong = int(np.sum(mine != values))
        verdict = PASS if not wrong else f"{FAIL} ({wrong} of {values.size} differ)"
    elif NOISE.match(name):
        verdict = PASS if max(error, peak) <= NOISE_FLOOR else f"{FAIL} (should be rounding noise)"
    else:
        verdict = PASS if error <= max(TOLERANCE * peak, ZERO if not peak else 0.0) else FAIL
    return Comparison(name, error, relative, peak, verdict)


def compute(case: Case) -> Arrays:
    """Everything our model can compute of a case, by the names of its outputs.

    Raises:
        CaseError: for a kind that is not known here.
    """
    if case.kind not in KINDS:
        known = ", ".join(KINDS)
        raise CaseError(
            f"{case.folder} is a case of the unknown kind {case.kind!r}: known are {known}."
        )
    module, function = KINDS[case.kind].split(":")
    run: Callable[[Case], Arrays] = getattr(
        importlib.import_module(f"internvl_jax.convert.{module}"), function
    )
    with jax.default_matmul_precision("highest"):
        return run(case)


def verify(folder: str | Path) -> Report:
    """Runs our model on a reference folder and compares every stored output.

    Args:
        folder: with ``config.json``, ``weights.safetensors``, ``io.safetensors``.

    Raises:
        CaseError: if it is no such folder or of an unknown kind.
        WeightsError: if the weights do not fit the model of its config.
        ConfigError: if its config describes no model of ours.
    """
    case = Case.read(folder)
    computed = compute(case)
    compared = tuple(
        compare(n, computed[n], case.outputs[n], case.scales.get(n))
        for n in sorted(case.outputs)
        if n in computed
    )
    absent = [n for n in sorted(case.outputs) if n not in computed]
    excused = [
        n for n in absent if any(re.fullmatch(p, n) for p in NOT_COMPUTED.get(case.kind, ()))
    ]
    left_out = [n for n in absent if n not in excused]
    return Report(str(folder), case.kind, compared, tuple(left_out), tuple(excused))


def lines(report: Report) -> list[str]:
    """A report as text, one line per tensor."""
    text = [f"{report.folder} ({report.kind})"]
    width = max((len(c.name) for c in report.compared), default=0)
    text.append(f"  {'tensor':<{width}}  max abs err   relative  verdict")
    for c in report.compared:
        text.append(f"  {c.name:<{width}}  {c.error:11.3e}  {c.relative:9.2e}  {c.verdict}")
    text += [f"  {name}: not computed (documented)" for name in report.excused]
    text += [f"  {name}: {FAIL} (not computed)" for name in report.left_out]
    failed = sum(not c.passed for c in report.compared)
    worst = max((c.relative for c in report.compared if not NOISE.match(c.name)), default=0.0)
    text.append(
        f"  {'passed' if report.passed else 'FAILED'}: {len(report.compared)} compared, "
        f"{failed} failed, {len(report.left_out)} left out, largest relative error {worst:.1e}"
    )
    return text


def to_json(reports: Sequence[Report]) -> list[Mapping[str, Any]]:
    """Reports as plain data."""
    return [
        {
            "folder": r.folder,
            "case": r.kind,
            "passed": r.passed,
            "tensors": [
                {
                    "name": c.name,
                    "max_abs_error": c.error,
                    "relative_error": c.relative,
                    "max_magnitude": c.peak,
                    "verdict": c.verdict,
                }
                for c in r.compared
            ],
            "left_out": list(r.left_out),
            "not_computed_documented": list(r.excused),
        }
        for r in reports
    ]


def write_json(reports: Sequence[Report], path: str | Path) -> None:
    """Writes reports to a file (what is not a number becomes null)."""

    def clean(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        if isinstance(x, list):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and not np.isfinite(x) else x

    Path(path).write_text(json.dumps([clean(r) for r in to_json(reports)], indent=1) + "\n")
