"""A plan for people: text, a table, a chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from internvl_jax.plan.compile import GIB
from internvl_jax.plan.report import Plan


def text(plan: Plan, top: int = 0) -> str:
    """The report of one plan, with so many of its costliest operations."""
    s = plan.summary()
    lines = [
        f"{plan.experiment.stage.name} on {s['topology']} ({s['slices']} x {s['accelerator']}, "
        f"{s['chips']} chips, {s['hosts']} hosts), mesh "
        + " x ".join(f"{axis} {n}" for axis, n in s["mesh"].items()),
        f"batch {s['global_batch']:,}, {s['batch_per_chip']:g} a chip; remat "
        f"{plan.experiment.stage.compute.remat}",
        "",
        f"memory     {s['hbm_peak_gib']:8.2f} of {s['hbm_capacity_gib']:g} GiB a chip "
        f"({s['hbm_arguments_gib']:.2f} arguments, {s['hbm_temporaries_gib']:.2f} temporaries): "
        + ("fits" if s["fits"] else "DOES NOT FIT"),
    ]
    if s["host_gib_per_host"] > 0.01:
        lines.append(
            f"host       {s['host_gib_per_host']:8.1f} of {s['host_capacity_gib']:.0f} GiB a host "
            f"offloaded; the link needs {s['host_link_s']:.2f} s a step, if nothing hides it"
        )
    if not s["fits"]:
        lines += _advice(plan)
    lines += [
        f"FLOPs      {s['model_flops_per_chip']:.3e} of the model, {s['hlo_flops_per_chip']:.3e} "
        f"executed a chip: {s['flops_ratio']:.3f} x",
        f"bytes      {s['hbm_bytes_per_chip']:.3e} of HBM traffic a chip",
        f"roofline   {s['roofline_s']:8.3f} s a step ("
        + ", ".join(f"{k} {v:.3f}" for k, v in s["seconds_by_kind"].items() if k != "collective")
        + f"); the model's FLOPs at peak take {s['model_s']:.3f} s",
        f"exposed    {s['exposed_collectives_s']:8.3f} s of collectives that nothing hides",
    ]
    for c in plan.cost.collectives:
        lines.append(
            f"  {c.kind:20}{c.network:4} {'async' if c.asynchronous else 'sync ':6}{c.count:6} x "
            f"{c.bytes / 1e9:9.2f} GB {c.seconds:7.3f} s, {c.exposed:.3f} exposed"
        )
    (low, high), (fast, slow) = s["samples_per_s"], s["days"]
    hosts = s["images_per_s_per_host"]
    chip = plan.topology.chip
    lines += [
        f"MFU        {s['mfu_bound_b']:8.3f} .. {s['mfu_bound_a']:.3f}, bounds B .. A, not "
        "predictions",
        f"samples/s  {low:8,.0f} .. {high:,.0f}; {hosts[0]:,.0f} .. {hosts[1]:,.0f} images a "
        "second and host to be fed",
        f"time       {fast:8.1f} .. {slow:.1f} days, {s['chip_hours'][0]:,.0f} .. "
        f"{s['chip_hours'][1]:,.0f} chip-hours for {s['phase_samples']:,} samples",
        "",
        "A: every operation at the chip's peak FLOP/s or memory bandwidth, whichever is slower, "
        "plus exposed collectives.",
        f"B: the same with the roofline times {chip.calibration:.2f}, the compiler's own estimate "
        f"for {chip.name}.",
        f"{chip.name}: {chip.flops / 1e12:g} TFLOP/s, {chip.hbm_bandwidth / 1e9:g} GB/s HBM, "
        f"assumed {chip.ici / 1e9:g} GB/s ICI and {chip.dcn / 1e9:g} GB/s DCN a chip.",
        ", ".join(f"{k} {v}" for k, v in s["versions"].items())
        + f"; compiled in {s['compile_s']:.0f} s, run on nothing.",
    ]
    lines += [
        f"{op.seconds:8.4f} s {op.kind:9} {op.executions:6} x {op.bytes / 1e9:8.1f} GB "
        f"{op.op_name[-70:]} {op.code}"
        for op in plan.cost.top(top)
    ]
    return "\n".join(lines)


def _advice(plan: Plan) -> list[str]:
    """By how much it does not fit, what is largest, and what may help."""
    memory, remat = plan.compiled.memory, plan.experiment.stage.compute.remat
    over, largest = plan.hbm_peak - plan.topology.chip.hbm, memory.largest[0]
    knobs = ["take the batch in parts: train.accumulate, with train.grad_cache in stage 1"]
    if memory.arguments > 0.1 * memory.peak:
        knobs.insert(0, "split the parameters over more chips: mesh")
    if "layer@" not in remat:
        knobs.insert(0, "rest the layers' inputs on the host: stage.compute.remat=layer@host")
    if remat != "full":
        knobs.insert(0, "keep fewer activations: stage.compute.remat=full")
    return [
        f"           {over:.2f} GiB too much; largest: {largest.size / GIB:.2f} GiB of "
        f"{largest.shapes[:80]}",
        *(f"           try to {words}" for words in knobs),
    ]


def line(plan: Plan | Exception) -> str:
    """A plan in a few words."""
    if isinstance(plan, Exception):
        return str(plan)
    fits = "fits" if plan.fits else "does not fit"
    return f"{fits}, {plan.hbm_peak:.1f} GiB, bound A {plan.bound_a:.3f}"


def table(plans: Iterable[tuple[str, Plan | Exception]]) -> str:
    """One line per plan, in their order.

    Columns: GiB a chip, GiB a host that is offloaded, executed over model FLOPs, seconds of the
    roofline, collectives' GB a chip, their exposed seconds, bounds B and A, samples/s at bound A.
    """
    plans = list(plans)
    width = max((len(name) for name, _ in plans), default=0)
    head = (
        f"{'':{width}} {'fits':5} {'GiB':>6} {'host':>5} {'hw':>6} {'roof s':>8} {'coll GB':>8} "
        f"{'exposed':>8} {'B':>6} {'A':>6} {'samples/s':>10}"
    )
    lines = [head]
    for name, plan in plans:
        if isinstance(plan, Exception):
            lines.append(f"{name:{width}} no: {plan}")
            continue
        cost = plan.cost
        lines.append(
            f"{name:{width}} {'yes' if plan.fits else 'NO':5} {plan.hbm_peak:6.1f} "
            f"{plan.host_gib:5.0f} {plan.flops_ratio:6.3f} {cost.roofline_s:8.3f} "
            f"{sum(c.bytes for c in cost.collectives) / 1e9:8.1f} {cost.exposed_s:8.3f} "
            f"{plan.bound_b:6.3f} {plan.bound_a:6.3f} "
            f"{plan.samples_per_s[1]:10,.0f}"
        )
    return "\n".join(lines)


def order(plan: Plan | Exception) -> tuple[bool, float]:
    """Sorts the best that fits first."""
    if isinstance(plan, Exception):
        return True, 0.0
    return not plan.fits, -plan.bound_a


def chart(plans: Sequence[tuple[str, Plan]], path: str) -> None:
    """Draws memory by kind and time by kind, one bar per plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.6 + 0.5 * len(plans)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, height), sharey=True)
    names = [name for name, _ in plans]
    summaries = [plan.summary() for _, plan in plans]

    def bars(axes, series: dict[str, list[float]]) -> None:
        start = [0.0] * len(names)
        for label, values in series.items():
            axes.barh(names, values, left=start, label=label, height=0.6)
            start = [a + b for a, b in zip(start, values, strict=True)]
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35 / len(plans) - 0.08), ncol=6)

    memory = {
        kind: [s[f"hbm_{kind}_gib"] for s in summaries] for kind in ("arguments", "temporaries")
    }
    bars(left, memory)
    for row, s in enumerate(summaries):
        left.plot([s["hbm_capacity_gib"]] * 2, [row - 0.4, row + 0.4], color="black", lw=1.5)
    left.set_xlabel("GiB a chip; the line is its capacity")
    kinds = [
        k
        for k in summaries[0]["seconds_by_kind"]
        if any(s["seconds_by_kind"][k] for s in summaries)
    ]
    steps = [s["roofline_s"] + s["exposed_collectives_s"] for s in summaries]
    shares = {
        kind: [s["seconds_by_kind"][kind] / step for s, step in zip(summaries, steps, strict=True)]
        for kind in kinds
    }
    bars(right, shares)
    for row, s in enumerate(summaries):
        right.plot([s["mfu_bound_a"]] * 2, [row - 0.4, row + 0.4], color="black", lw=1.5)
    right.set_xlabel("share of a step at best; the line is the model's FLOPs at peak, bound A")
    left.invert_yaxis()
    versions = ", ".join(f"{k} {v}" for k, v in summaries[0]["versions"].items())
    figure.suptitle(f"Compiled ahead of time, run on nothing ({versions})", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
