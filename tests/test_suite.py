"""The tests themselves: they use the public interface, and few reach into a module."""

from places import ROOT

MOST_PATCHES = 60


def test_few_tests_replace_what_a_module_holds():
    """Such a test fails when the code is reshaped, and passes when what it replaced is not used."""
    call = ".setattr" + "("  # not itself
    files = (ROOT / "tests").rglob("*.py")
    found = {str(path): path.read_text(encoding="utf-8").count(call) for path in files}
    assert len(found) > 80
    most = sorted(found.items(), key=lambda one: -one[1])[:8]
    assert sum(found.values()) <= MOST_PATCHES, most
