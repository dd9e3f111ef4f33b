"""The report: one self-contained page, light and dark, without scripts or network.

content   what it says, as plain values (`Report`)
page      the page, `write_report`
examples  its sections about single pictures
charts    its charts, small SVGs
markup    HTML and SVG as nested calls
style     its style sheet
demo      from the demo's figures and logs to a `Report`
"""

from internvl_jax.evaluate.report.content import Bars, Cell, Claim, Curve, Report
from internvl_jax.evaluate.report.page import render, write_report

__all__ = ["Bars", "Cell", "Claim", "Curve", "Report", "render", "write_report"]
