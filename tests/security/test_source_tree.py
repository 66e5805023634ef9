"""What no file of this repository does: read a pickle, run a text as a program, open a shell, trust foreign code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

TREES = ("finetune", "tools", "benchmarks", "tests")
# Where attacks are made and shown to work against the libraries as they are.
ATTACKS = {"tests/security/attacks.py", "tests/security/stock.py"}
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pickletools"}
CALLS = {
    "eval", "exec", "execfile", "compile", "builtins.eval", "builtins.exec", "torch.load", "torch.save",
    "torch.hub.load", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all",
    "pandas.read_pickle", "jinja2.Template", "jinja2.Environment",
}  # fmt: skip
# The one loader of ours, which is a SafeLoader; a test below holds it.
LOADERS = {"finetune/recipe_yaml.py"}
PRETRAINED = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}


def python_files() -> list[Path]:
    files = [CHECKOUT / "cli.py", *(file for tree in TREES for file in (CHECKOUT / tree).rglob("*.py"))]
    return sorted(file for file in files if file.relative_to(CHECKOUT).as_posix() not in ATTACKS)


def forbidden(source: str, name: str) -> Iterator[str]:
    """`line: what` of everything in a source that is not to be there."""
    tree = ast.parse(source)
    known = dict(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: {module}" for module in modules if module.split(".")[0] in MODULES)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {what}" for what in _forbidden_call(node, known, name))


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name -> full name of what a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)


def _forbidden_call(node: ast.Call, known: dict[str, str], name: str) -> Iterator[str]:
    written = ast.unparse(node.func)
    first, _, rest = written.partition(".")
    called = known.get(first, first) + (f".{rest}" if rest else "")
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if called in CALLS:
        yield called
    if called == "yaml.load" and name not in LOADERS:
        yield called
    if "shell" in keywords and not is_constant(keywords["shell"], False):
        yield f"{called}(shell=...)"
    if is_constant(keywords.get("weights_only"), False) or is_constant(keywords.get("allow_pickle"), True):
        yield f"{called} of a pickle"
    if is_constant(keywords.get("trust_remote_code"), True) or is_constant(keywords.get("trust_remote_code"), None):
        yield f"{called}(trust_remote_code=...)"


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_file_does_what_no_file_may() -> None:
    files = python_files()
    found = [
        f"{file.relative_to(CHECKOUT)}:{what}"
        for file in files
        for what in forbidden(file.read_text(encoding="utf-8"), file.relative_to(CHECKOUT).as_posix())
    ]
    assert not found
    assert len(files) > 150  # the trees are really there


@pytest.mark.parametrize(
    "added",
    [
        "import pickle", "from pickle import loads", "import dill as d", "import torch\ntorch.load('x')",
        "from torch import load\nload('x')", "import torch as t\nt.load('x')", "f = torch.load",
        "eval('1')", "exec('x')",
        "compile('1', '', 'eval')", "import os\nos.system('x')", "from os import system as s\ns('x')", "os.popen('x')",
        "subprocess.run('x', shell=True)", "subprocess.run('x', shell=maybe)", "import yaml\nyaml.load(x, Loader=L)",
        "from yaml import unsafe_load\nunsafe_load(x)", "np.load(x, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "AutoModel.from_pretrained(x, trust_remote_code=None)",
        "jinja2.Template(x)", "from jinja2 import Environment\nEnvironment()",
    ],
)  # fmt: skip
def test_each_of_them_would_be_seen(added: str) -> None:
    assert list(forbidden(added, "finetune/any.py"))


@pytest.mark.parametrize("harmless", ["model.eval()", "re.compile('x')", "np.load(x)", "f.load(x)"])
def test_what_only_sounds_like_one_is_not(harmless: str) -> None:
    assert not list(forbidden(harmless, "finetune/any.py"))


def test_the_recipes_loader_makes_no_objects() -> None:
    """The one place that hands yaml a loader of its own: a subclass of the safe one."""
    import yaml

    from finetune import recipe_yaml

    classes = [each for each in vars(recipe_yaml).values() if isinstance(each, type)]
    loaders = [each for each in classes if hasattr(each, "yaml_constructors")]
    assert loaders
    for loader in loaders:
        assert issubclass(loader, yaml.SafeLoader)
        assert not issubclass(loader, (yaml.FullLoader, yaml.UnsafeLoader))
        assert not [tag for tag in loader.yaml_constructors if tag and "python" in tag]


def silent_loads(source: str) -> list[int]:
    """Lines that load a model or tokenizer by its config without a word on foreign code."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).removesuffix(".from_pretrained") in PRETRAINED
        and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}
    ]


def test_every_load_of_a_model_says_whose_code_may_run() -> None:
    files = {str(file.relative_to(CHECKOUT)): file.read_text() for file in (CHECKOUT / "finetune").rglob("*.py")}
    assert [name for name, source in files.items() if silent_loads(source)] == []
    assert silent_loads("AutoConfig.from_pretrained(x)") == [1]
