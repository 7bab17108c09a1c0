"""What all figures share: colours for the colour-blind, a style, and SVG that is the same for the same data."""

import io
from contextlib import AbstractContextManager
from typing import Any

# Okabe & Ito (2008) without their yellow, which paper does not show; told apart in grey print too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = PALETTE


def style(name: str, **further: Any) -> AbstractContextManager:
    """matplotlib's settings for the figure `name`: text stays text, no frame on the right and above."""
    import matplotlib

    own: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "axes.spines.top": False, "axes.spines.right": False}
    return matplotlib.rc_context(own | {"axes.unicode_minus": False} | further)  # numbers in text have hyphens


def svg_of(figure: Any) -> str:
    """A matplotlib Figure as SVG; made without pyplot, it needs no window and leaves no global state."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()
