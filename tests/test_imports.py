"""The house stands: imports go down, the front door is light and shows the public names, files are
short, errors are named.

What a test of behaviour cannot see, read from the source with ``ast``.
"""

import ast
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from looping import over
from places import ROOT

import llm_wsae

PACKAGE = ROOT / "llm_wsae"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """``llm_wsae.data.store``; a package has the name of its folder, the root ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts == ("llm_wsae", "__init__"):
        return "llm_wsae.__init__"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of everything imported, in functions too; our modules by their own names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield node.lineno, below if below in TREES else node.module


def test_imports_only_go_down_and_make_no_circle():
    """The layers are in pyproject.toml."""
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@over(path=FILES)
def test_files_say_what_they_are_for(path):
    assert ast.get_docstring(TREES[module_name(path)]), f"{path} has no docstring"


def names_caught(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"everything"}
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(one) for one in caught}


@over(module=TREES)
def test_no_error_is_swallowed_unnamed(module):
    """``except Exception`` may tidy up or say it in a sentence, but must raise again."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ExceptHandler):
            caught = names_caught(node)
            where = f"{module}, line {node.lineno}: except {', '.join(sorted(caught))}"
            assert "everything" not in caught, where
            if caught & {"BaseException", "Exception"}:
                assert isinstance(node.body[-1], ast.Raise), f"{where} that does not raise"


OPENS_A_PICKLE = "llm_wsae.dictionary.formats.dictionary_learning"  # another tool's only format


@over(module=TREES)
def test_nothing_is_pickled(module):
    tree = TREES[module]
    calls = {ast.unparse(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    found = set(calls) & {"torch.save", "torch.load", "np.save", "np.load"}
    if module == OPENS_A_PICKLE:  # by the loader that knows tensors and nothing else
        assert [
            ast.unparse(k) for k in calls["torch.load"].keywords if k.arg == "weights_only"
        ] == ["weights_only=True"]
        assert sum(ast.unparse(n) == "torch.load" for n in ast.walk(tree)) == 1
        found.remove("torch.load")
    else:
        pickling = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
        assert not pickling & {m.split(".")[0] for _, m in imported(tree)}
    assert not found


HEAVY = ("torch", "transformers", "transformer_lens", "datasets", "matplotlib", "numpy")


def test_the_package_and_its_command_line_come_without_torch():
    script = f"""
import sys
import llm_wsae
dir(llm_wsae)
import llm_wsae.cli
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []


def test_help_comes_at_once():
    """Under half a second of work; the best of five, without what others do on the machine."""

    def best_of_five(*command):
        seconds = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            found = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, check=True
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        return min(seconds), found

    nothing, _ = best_of_five("-c", "pass")
    if nothing > 0.06:  # three times what a sound machine needs
        pytest.skip(f"starting Python alone takes {nothing:.2f} s here: no machine to time on")
    seconds, found = best_of_five("-m", "llm_wsae", "--help")
    assert "llm-wsae COMMAND" in found.stdout and found.stderr == ""
    assert seconds < 0.5


def test_every_public_name_is_the_thing_itself():
    for name in llm_wsae.__all__:
        value = getattr(llm_wsae, name)
        assert name in dir(llm_wsae)
        if name not in ("__version__", "RULES"):
            assert (value.__name__, value.__module__) == (name, llm_wsae._HOMES[name])


def test_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert llm_wsae.__version__ == project["project"]["version"]


def test_unknown_names_are_errors():
    with pytest.raises(AttributeError, match="'llm_wsae' has no attribute 'Harvester'"):
        llm_wsae.Harvester  # noqa: B018


def test_names_mean_the_same_whatever_is_imported_first():
    """No module may stand where a public function is looked for."""
    script = """
import pkgutil, importlib, llm_wsae
from llm_wsae import harvest, train, evaluate, run, study, attach, inspect, load_pretrained
for found in pkgutil.walk_packages(llm_wsae.__path__, "llm_wsae."):
    if found.name not in ("llm_wsae.__main__", "llm_wsae.saelens.training"):
        importlib.import_module(found.name)
for name in llm_wsae.__all__:
    value = getattr(llm_wsae, name)
    assert type(value).__name__ != "module", name
assert llm_wsae.train is train and callable(train)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
