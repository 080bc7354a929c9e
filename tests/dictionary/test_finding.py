"""What a word of the command line means: folders, the Hub, pretrained names, SAELens' releases."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

from command_line import refused
from hub_fixtures import HERE, REPO, place
from refusals import fails, misused
from small_dictionaries import make_dictionary

from llm_wsae.dictionary.dictionary import PRETRAINED, Dictionary
from llm_wsae.dictionary.finding import find_dictionaries, find_dictionary
from llm_wsae.dictionary.folder import EXTRAS, INFO


def make_foreign(folder: Path) -> None:
    """As SAELens saves it."""
    make_dictionary().save(folder)
    for name in (INFO, EXTRAS):
        (folder / name).unlink()


def test_a_folder_stands_for_all_dictionaries_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["run/b.9/plain", "run/b.9/weighted", "run/b.20/plain"]
    for name in [*names[::-1], "run/.old/plain"]:
        make_dictionary().save(Path(name))
    make_foreign(Path("run/theirs"))
    Path("run/b.9/log.jsonl").touch()
    assert find_dictionaries([Path("run")]) == [*map(Path, names), Path("run/theirs")]
    assert find_dictionaries([Path("run/theirs"), Path("run/b.20")]) == [
        Path("run/theirs"), Path(names[2])
    ]  # fmt: skip
    assert find_dictionary(Path("run/b.20")) == Path(names[2])
    misused("run holds 4 dictionaries; name one: known are .*",
            find_dictionary, Path("run"))  # fmt: skip
    Path("run/b.9/plain").rename("run/b.9/.plain.old")  # by a writer that was killed
    assert find_dictionary(Path("run/b.9/plain")) == Path("run/b.9/plain")
    log, wrong = Path("run/b.9/log.jsonl"), Path("run/c.9/plain")
    misused(r"log.jsonl is a file, not .*: run/b.9$", find_dictionaries, [Path(names[0]), log])
    misused(r"'run/c.9/plain' is no folder and .*\(did you mean 'run/b.9'", find_dictionary, wrong)


def test_a_repository_on_the_hub_is_read_through_the_cache(there, weighted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = find_dictionary(Path(REPO))
    assert Dictionary.load(folder).info.name == "plain-k4"
    assert find_dictionary(Path(REPO, HERE)) == folder
    place(there, "other", weighted)
    there.requests.clear()
    misused(rf"{REPO} holds 2 .*: known are '{REPO}/{HERE}', '{REPO}/other'", find_dictionary,
            Path(REPO))  # fmt: skip
    assert not any("resolve" in path for _, path in there.requests)  # nothing was downloaded
    assert [path.name for path in find_dictionaries([Path(REPO)])] == ["plain-k4", "other"]
    misused(f"{REPO} has no dictionary 'othr'; did you mean 'other'", find_dictionary,
            Path(REPO, "othr"))  # fmt: skip
    misused("'user/no' is no folder and no pretrained dictionary, and there is no repository user/",
            find_dictionary, Path("user/no"))  # fmt: skip
    evaluating = ("evaluate", REPO, "--model", "m", "--corpus", "c", "--out", "o.json", "--keep")
    refused(evaluating, "is only a link, so measurements are not kept there; copy the dictionary")
    make_dictionary().save(Path(REPO, "other"))
    there.requests.clear()
    assert find_dictionaries([Path(REPO)]) == [Path(REPO, "other")] and there.requests == []
    fails("there are no dictionaries|is no folder", find_dictionary, Path("user/none"))


def test_a_pretrained_name_is_a_folder_of_the_clone():
    name = "smollm2-135m/blocks.9.hook_resid_post/uniform-k32"
    assert find_dictionary(Path(name)) == PRETRAINED / name
    fails(f"no pretrained dictionary .did you mean '{name}'", find_dictionary, Path(name[:-1]))


def test_a_release_of_saelens_is_saved_into_a_cache(hub, tmp_path, monkeypatch):
    """By the functions of SAELens 6, which is not installed for the tests."""
    loaded, name = [], Path("scope:layer_1/width_9")

    def from_pretrained(release, sae_id):
        loaded.append((release, sae_id))
        return SimpleNamespace(save_model=make_foreign)

    lookup = SimpleNamespace(repo_id="them/scope", saes_map={"layer_1/width_9": "layer_1"})
    package = ModuleType("sae_lens")
    package.__spec__ = importlib.machinery.ModuleSpec("sae_lens", None)
    package.SAE = SimpleNamespace(from_pretrained=from_pretrained)
    directory = ModuleType("pretrained_saes_directory")
    directory.get_pretrained_saes_directory = lambda: {"scope": lookup}
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("sae_lens") is None:
        misused("release of SAELens, which is not installed", find_dictionary, name)
    monkeypatch.setitem(sys.modules, "sae_lens", package)
    monkeypatch.setitem(sys.modules, "sae_lens.loading", ModuleType("loading"))
    monkeypatch.setitem(sys.modules, "sae_lens.loading.pretrained_saes_directory", directory)
    folders = find_dictionaries([name, name])
    assert loaded == [("scope", "layer_1/width_9")] and folders[0] == folders[1]
    assert Dictionary.load(folders[0]).d_in == make_dictionary().d_in
    misused("no release 'scop'; did you mean 'scope'", find_dictionary, Path("scop:layer_1"))
    misused("release scope has no 'layer_2'; did you mean 'layer_1/width_9'", find_dictionary,
            Path("scope:layer_2"))  # fmt: skip
