"""How the page looks: one palette, told to Gradio's theme and to our own stylesheet through the same CSS variables.

In:  the theme's name (dark, light, system).
Out: a Gradio theme, and the CSS and JavaScript of assets/studio.
Knows nothing of tabs. System fonts only: the page asks no other machine for anything.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from engine.identity.report import COLOURS
from engine.paths import ROOT

STUDIO = ROOT / "assets" / "studio"
ICON = STUDIO / "icon.png"

DARK = {
    "scheme": "dark",
    "ground": "#101216",
    "panel": "#181b21",
    "raised": "#21252d",
    "line": "#323844",
    "edge": "#727c8d",
    "ink": "#eceef2",
    "soft": "#a9b1be",
    "accent": "#ffb84d",
    "accent-hover": "#ffc977",
    "on-accent": "#1d1403",
    "danger": "#ff8f85",
    "danger-ground": "#3a1d1c",
    "good": "#7fd99a",
    "focus": "#8ecbff",
}
LIGHT = {
    "scheme": "light",
    "ground": "#f3f1ec",
    "panel": "#ffffff",
    "raised": "#f5f3ee",
    "line": "#d8d3c8",
    "edge": "#868070",
    "ink": "#1c1f26",
    "soft": "#555c69",
    "accent": "#f2a324",
    "accent-hover": "#ffb84d",
    "on-accent": "#1d1403",
    "danger": "#a3241a",
    "danger-ground": "#fbe6e3",
    "good": "#1d6e3a",
    "focus": "#0b62b8",
}
# One colour per subject, the same wherever it appears: its tile, its chip, its @name in every prompt.
SLOTS_DARK = COLOURS
SLOTS_LIGHT = ("#b0441c", "#0b6e5f", "#5a3fc0", "#135f9e", "#a52a68", "#566a0c", "#7a4e1d", "#44596e")

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "Menlo", "monospace"]


def css(theme: str) -> str:
    """The whole stylesheet: the palette of that theme, then our rules."""
    rules = (STUDIO / "studio.css").read_text(encoding="utf-8")
    dark, light = _variables(DARK, SLOTS_DARK), _variables(LIGHT, SLOTS_LIGHT)
    if theme == "system":
        return f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{rules}"
    return f":root {{ {light if theme == 'light' else dark} }}\n{rules}"


def head(theme: str) -> str:
    """What goes into the page's head: the colour of a phone's title bar, and our script."""
    script = (STUDIO / "studio.js").read_text(encoding="utf-8")
    ground = (LIGHT if theme == "light" else DARK)["ground"]
    return f'<meta name="theme-color" content="{ground}"><script>{script}</script>'


def _variables(palette: dict[str, str], slots: tuple[str, ...]) -> str:
    colours = {f"slot-{place}": value for place, value in enumerate(slots)}
    named = {name: value for name, value in palette.items() if name != "scheme"}
    return f"color-scheme: {palette['scheme']}; " + " ".join(f"--{k}: {v};" for k, v in (named | colours).items())


class StudioTheme(gr.themes.Base):
    """Gradio's components in our palette; light and dark variants are the same, since the palette itself switches."""

    def __init__(self) -> None:
        super().__init__(
            font=FONT,
            font_mono=MONO,
            radius_size=gr.themes.sizes.radius_md,
            spacing_size=gr.themes.sizes.spacing_md,
            text_size=gr.themes.sizes.text_md,
        )
        values = _theme_values()
        self.set(**values, **{f"{key}_dark": value for key, value in values.items() if f"{key}_dark" in _settable()})


def _settable() -> frozenset[str]:
    code = gr.themes.Base.set.__code__
    return frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


# The palette's variables, as css writes them.
GROUND = "var(--ground)"
PANEL = "var(--panel)"
RAISED = "var(--raised)"
LINE = "var(--line)"
EDGE = "var(--edge)"
INK = "var(--ink)"
SOFT = "var(--soft)"
ACCENT = "var(--accent)"
ON_ACCENT = "var(--on-accent)"
FOCUS = "var(--focus)"


def _theme_values() -> dict[str, Any]:
    """Gradio's theme variables, each a variable of our palette or a length."""
    return {**_ground_values(), **_control_values(), **_button_values()}


def _ground_values() -> dict[str, Any]:
    """What everything lies on: page, panels, blocks and links."""
    return {
        "body_background_fill": GROUND,
        "body_text_color": INK,
        "body_text_color_subdued": SOFT,
        "background_fill_primary": PANEL,
        "background_fill_secondary": RAISED,
        "border_color_primary": LINE,
        "border_color_accent": ACCENT,
        "border_color_accent_subdued": LINE,
        "color_accent": ACCENT,
        "color_accent_soft": RAISED,
        "link_text_color": FOCUS,
        "link_text_color_active": FOCUS,
        "link_text_color_hover": INK,
        "link_text_color_visited": FOCUS,
        "block_background_fill": "transparent",
        "block_border_color": LINE,
        "block_border_width": "0px",
        "block_padding": "0px",
        "block_shadow": "none",
        "block_info_text_color": SOFT,
        "block_label_background_fill": RAISED,
        "block_label_text_color": SOFT,
        "block_title_text_color": SOFT,
        "block_title_text_weight": "500",
        "block_title_text_size": "*text_sm",
        "form_gap_width": "0px",
        "layout_gap": "12px",
        "panel_background_fill": PANEL,
        "panel_border_color": LINE,
        "accordion_text_color": INK,
        "error_background_fill": "var(--danger-ground)",
        "error_border_color": "var(--danger)",
        "error_text_color": "var(--danger)",
        "loader_color": ACCENT,
        "slider_color": ACCENT,
        "table_border_color": LINE,
        "table_even_background_fill": PANEL,
        "table_odd_background_fill": PANEL,
    }


def _control_values() -> dict[str, Any]:
    """What a person fills in: check boxes and fields."""
    return {
        "checkbox_background_color": RAISED,
        "checkbox_background_color_selected": ACCENT,
        "checkbox_border_color": EDGE,
        "checkbox_border_color_selected": ACCENT,
        "checkbox_border_color_focus": FOCUS,
        "checkbox_label_background_fill": RAISED,
        "checkbox_label_background_fill_hover": LINE,
        "checkbox_label_background_fill_selected": "color-mix(in srgb, var(--accent) 22%, var(--raised))",
        "checkbox_label_border_color": LINE,
        "checkbox_label_border_color_selected": ACCENT,
        "checkbox_label_text_color": INK,
        "checkbox_label_text_color_selected": INK,
        "checkbox_label_padding": "7px 12px",
        "input_background_fill": RAISED,
        "input_background_fill_focus": RAISED,
        "input_border_color": LINE,
        "input_border_color_focus": FOCUS,
        "input_border_width": "1px",
        "input_padding": "8px 10px",
        "input_placeholder_color": "color-mix(in srgb, var(--soft) 88%, var(--ground))",
        "input_shadow": "none",
        "input_shadow_focus": "none",
    }


def _button_values() -> dict[str, Any]:
    """What a person presses."""
    return {
        "button_transition": "background-color 120ms, border-color 120ms",
        "button_primary_background_fill": ACCENT,
        "button_primary_background_fill_hover": "var(--accent-hover)",
        "button_primary_border_color": ACCENT,
        "button_primary_text_color": ON_ACCENT,
        "button_primary_text_color_hover": ON_ACCENT,
        "button_primary_shadow": "none",
        "button_secondary_background_fill": RAISED,
        "button_secondary_background_fill_hover": LINE,
        "button_secondary_border_color": LINE,
        "button_secondary_text_color": INK,
        "button_secondary_text_color_hover": INK,
        "button_secondary_shadow": "none",
        "button_large_radius": "10px",
        "button_large_text_weight": "650",
    }
