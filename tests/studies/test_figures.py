"""What figures of a study draw."""

import itertools

from study_cases import Made

from llm_wsae.studies import figures
from llm_wsae.studies.comparison import compare


def test_names_of_k_above_a_panel_never_touch(tmp_path, monkeypatch):
    """Of neighbours that cost nearly the same, one text has all names."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    ks = (16, 24, 32, 48, 60, 62, 64, 96, 112, 120, 124, 128)
    results = Made().curve(ks) + Made().rule()
    figures.plot_curve(results, compare(results), "blocks.1.hook_resid_post", tmp_path / "_.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    named = [text for text in figure.axes[0].texts if text.get_text()[0].isdigit()]
    boxes = sorted((text.get_window_extent() for text in named), key=lambda box: box.x0)
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
    names = sorted((text.get_text() for text in named), key=lambda name: int(name.split(",")[0]))
    assert ", ".join(names) == ", ".join(map(str, ks))
    assert 1 < len(named) < len(ks)  # some share a text, not all
