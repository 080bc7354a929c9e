"""What a page says of its dictionaries in words."""

import pytest
import torch

from llm_wsae.inspecting.labels import Clause, Label
from llm_wsae.pages.telling import recognisable


@pytest.mark.parametrize(
    "values, density, wanted",
    [
        (("tax", "duties", "tariff", "customs"), 1e-3, 0.6),
        (("duties", "customs", "tariff…"), 1e-2, 0.6),  # a word that goes on
        (("duties", "tariff"), 1e-3, 0.06),
        (("tariff", "tariffs", "tariffed"), 1e-3, 0.06),  # one word
        (("with", "from", "under", "about"), 1e-3, 0.06),  # short ones
        (("duties", "customs", "tariff"), 0.02, 0),
        (("duties", "customs", "tariff"), 0.0, 0),
        ((), 1e-3, 0),
    ],
)
def test_a_latent_is_recognisable_by_a_label_of_several_words(values, density, wanted):
    label = Label((Clause("word", values),) if values else (), 0.6 if values else 0.0)
    assert recognisable(torch.tensor([density]), [label]).tolist() == pytest.approx([wanted])
    twofold = Label((*label.clauses, Clause("kind", ("numbers",))), 0.6)
    assert recognisable(torch.tensor([density]), [twofold]).tolist() == pytest.approx(
        [0.06 if 0 < density < 0.02 else 0]
    )
