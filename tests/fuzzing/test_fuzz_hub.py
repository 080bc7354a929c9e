"""Repositories whose files are damaged: a sentence, or the dictionary that was asked for."""

import shutil

from command_line import content
from fuzzing import Fuzz, blind, frozen
from hub_fixtures import REPO
from small_dictionaries import SITE

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.hub.transfer import list_dictionaries, pull


def test_damaged_repositories(hub, plain, tmp_path, fuzz: Fuzz):
    """Checksums of the Hub match what is damaged; the dictionary's own do not."""
    whole, files = frozen(Dictionary.load(plain)), content(plain)
    for name, data in files.items():
        hub.put(REPO, f"{SITE}/plain-k4/{name}", data)
    repository, out = hub.repositories[REPO], tmp_path / "out"
    good = repository.branches["main"]

    def read():
        list_dictionaries(REPO)
        return [frozen(Dictionary.load(folder)) for folder in pull(REPO, out).values()] == [whole]

    for number, draw in fuzz.cases("repository", 20):
        name = draw.choice(sorted(files))
        done, data = blind(files[name], draw, draw.choice(sorted(files.values())))
        hub.put(REPO, f"{SITE}/plain-k4/{name}", data)
        fuzz.reads("repository", f"{number} ({name}: {done})", read, frozen(True))
        repository.branches["main"] = good
        shutil.rmtree(out, ignore_errors=True)
