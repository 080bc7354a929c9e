"""What commands share beyond their options."""

from pathlib import Path

import pytest
from small_dictionaries import make_dictionary

from llm_wsae.dictionary.folder import names_of
from llm_wsae.errors import UsageError
from llm_wsae.pages.dashboard import named_dictionaries


def test_dictionaries_are_named_for_their_folders_however_these_are_given(tmp_path, monkeypatch):
    for name in ("one/plain", "one/plain/inner", "two/plain"):
        make_dictionary().save(tmp_path / name)
    (tmp_path / "latest").symlink_to(tmp_path / "two/plain")
    monkeypatch.chdir(tmp_path / "one/plain/inner")
    here, above, link = Path("."), Path(".."), tmp_path / "latest"
    assert names_of((here, above, link)) == {"inner": here, "plain": above, "latest": link}
    other = tmp_path / "two/plain"
    assert names_of((above, other, above)) == {"..": above, str(other): other}
    assert list(named_dictionaries([".", above, link])) == ["inner", "plain", "latest"]
    assert list(named_dictionaries([above, other])) == ["plain", "plain (2)"]
    with pytest.raises(UsageError, match="name at least one dictionary folder"):
        names_of(())
