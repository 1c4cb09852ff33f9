"""The house's rules, read off the source: imports point one way, patches have one place, options are read, the README is true."""

import ast
import dataclasses
import fnmatch
import functools
import itertools
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamod import config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megamod"
MODULES = sorted(PACKAGE.rglob("*.py"))
CLASSES = {name: c for name, c in vars(config).items() if isinstance(c, type) and c.__module__ == config.__name__}
CONFIGS = {name: c for name, c in CLASSES.items() if dataclasses.is_dataclass(c)}

MEGATRON = ("model/", "parallel/", "step.py", "optim.py")  # where megamod imports megatron-core
PATCHES = "parallel/cpu.py"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported, wherever, and every name that is taken from one: `a.b` and `a.b.c` of `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(parsed(file))}


def test_something_is_read() -> None:
    assert len(MODULES) > 20
    assert "torch" in tops(PACKAGE / "step.py")
    assert len(CONFIGS) >= 8


# --- imports ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_megamod_imports_nothing_that_stands_on_it(file: Path) -> None:
    folders = ("configs", "launch", "tools", "tests")
    outside = {*folders, *(f.stem for folder in folders for f in (ROOT / folder).glob("*.py"))}
    assert not tops(file) & outside


def test_kernels_import_neither_megamod_nor_megatron() -> None:
    for file in (ROOT / "kernels" / "megamod_kernels").rglob("*.py"):
        assert not tops(file) & {"megamod", "megatron"}, file


def test_megatron_is_imported_in_few_places() -> None:
    users = [name_of(file) for file in MODULES if "megatron" in tops(file)]
    assert [user for user in users if not user.startswith(MEGATRON)] == []
    assert [place for place in MEGATRON if not any(user.startswith(place) for user in users)] == []  # the list is no longer than needed


def test_transformers_is_the_tokenizer_and_no_part_of_the_model() -> None:
    assert [name_of(file) for file in MODULES if "transformers" in tops(file)] == ["data/tokenizer.py"]


def test_parallel_state_has_one_caller() -> None:
    users = [name_of(file) for file in MODULES if any("parallel_state" in name.split(".") for name in imports(parsed(file)))]
    assert users == ["parallel/grid.py"]


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folders_that_must_not_be_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_are_flat() -> None:
    assert [p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name not in ("__pycache__", "golden")] == []


# --- state -----------------------------------------------------------------------------------------------------------------


def patches(tree: ast.Module) -> Iterator[str]:
    """Attributes of what is imported from elsewhere that are set or deleted: `torch.cuda.synchronize = …`, `setattr(Tensor, …)`."""
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        target: ast.expr | None = None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            target = node.args[0]
        if target is not None:
            text = ast.unparse(target)
            while isinstance(target, ast.Attribute):
                target = target.value
            if isinstance(target, ast.Name) and target.id in foreign:
                yield text


def test_what_counts_as_a_patch() -> None:
    found = patches(
        ast.parse("import torch as t\nfrom torch import nn\nt.a.b = 1\nx.y = 2\nx.z = t.c\nsetattr(nn, 'q', 3)\ndel t.d\nt.e += 1\n")
    )
    assert sorted(found) == ["nn", "t.a.b", "t.d", "t.e"]


def test_patches_have_one_place() -> None:
    assert [name_of(file) for file in MODULES if any(patches(parsed(file)))] == [PATCHES]
    assert "torch.Tensor.cuda" in set(patches(parsed(PACKAGE / PATCHES)))


def test_no_global_state() -> None:
    users = [name_of(file) for file in MODULES if any(isinstance(node, ast.Global) for node in ast.walk(parsed(file)))]
    assert set(users) <= {PATCHES}


# --- options ---------------------------------------------------------------------------------------------------------------


class Reads(ast.NodeVisitor):
    """(dataclass, field) of each field of a configuration that is read, following annotations, assignments and `self`."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.scopes: list[dict[str, str]] = [{}]  # variable, or `self.x` → the name of its dataclass
        self.own: dict[str, str] = {}  # of the class at hand: `self.x`

    def type_of(self, node: ast.expr) -> str | None:
        text = ast.unparse(node)
        for known in (*reversed(self.scopes), self.own):
            if text in known:
                return known[text]
        if isinstance(node, ast.Attribute) and (owner := self.type_of(node.value)):
            hint = typing.get_type_hints(CONFIGS[owner]).get(node.attr)
            options = [t.__name__ for t in (hint, *typing.get_args(hint)) if isinstance(t, type) and t.__name__ in CONFIGS]
            return options[0] if options else None
        return None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.own = self.own, {}
        for field in node.body:  # of a dataclass
            if isinstance(field, ast.AnnAssign) and (kind := ast.unparse(field.annotation)) in CONFIGS:
                self.own[f"self.{ast.unparse(field.target)}"] = kind
        self.generic_visit(node)
        self.own = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope = {}
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            for word in re.findall(r"\w+", ast.unparse(argument.annotation)) if argument.annotation else []:
                if word in CONFIGS:
                    scope[argument.arg] = word
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for to, value in pairs:
                if kind := self.type_of(value):
                    text = ast.unparse(to)
                    (self.own if text.startswith("self.") else self.scopes[-1])[text] = kind

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner = self.type_of(node.value)
        if owner and isinstance(node.ctx, ast.Load):
            self.found.add((owner, node.attr))


def reads(*trees: ast.Module) -> set[tuple[str, str]]:
    visitor = Reads()
    for tree in trees:
        visitor.visit(tree)
    return visitor.found


def test_what_counts_as_a_read() -> None:
    source = """
class A:
    def __init__(self, cfg: "LogConfig | None", other: Other) -> None:
        self.cfg, self.n = cfg, other.tensorboard
    def f(self) -> None:
        return self.cfg.every
def g(cfg: RunConfig) -> None:
    d = cfg.data
    def inner() -> None:
        return d.train.sigma
    other.steps
    d.row_length = 3
class B:
    chat: ChatConfig
    def f(self) -> None:
        return self.chat.turns
"""
    found = {("ChatConfig", "turns"), ("LogConfig", "every"), ("RunConfig", "data"), ("DataConfig", "train"), ("SyntheticData", "sigma")}
    assert reads(ast.parse(source)) == found


def test_every_option_is_read() -> None:
    """An option that nothing reads is a lie to whoever sets it."""
    found = reads(*(parsed(file) for file in MODULES if file.name != "config.py"))
    fields = {(name, f.name) for name, c in CONFIGS.items() for f in dataclasses.fields(c)}
    assert sorted(fields - found) == []


# --- words -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_docstrings(file: Path) -> None:
    body = parsed(file).body
    assert not body or ast.get_docstring(parsed(file)), "the module has none"
    public = [node for node in body if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def files() -> Iterator[Path]:
    """Every file of the repository: what .gitignore does not name."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    ignored = [".git", *(line.strip("/") for line in lines)]
    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
                if path.is_dir():
                    folders.append(path)
                else:
                    yield path


def test_no_package_registry_is_named() -> None:
    """Where packages come from is the machine's business: pip's configuration, never a file of ours."""
    parts = (
        ("py", "pi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("anaconda", "com"), ("download", "pytorch", "org"),
        ("pypi", "nvidia", "com"), ("npmjs", "org"), ("crates", "io"), ("ghcr", "io"), ("docker", "io"), ("nvcr", "io"), ("quay", "io"),
    )  # fmt: skip
    hosts = [".".join(p).replace("py.pi", "pypi") for p in parts]
    seen = list(files())
    assert ROOT / "setup.py" in seen
    assert Path(__file__) in seen
    found = [f"{path.relative_to(ROOT)}: {host}" for path, host in itertools.product(seen, hosts) if host.encode() in path.read_bytes()]
    assert found == []


# --- the README's tree -----------------------------------------------------------------------------------------------------

WORD = re.compile(r"[\w.*-]+\.(?:py|sh|sbatch|md|toml|json|png)\b|\bLICENSE\b|\b\w+/(?=[\s:])")


def tree() -> list[str]:
    """The lines of the README's fenced block whose first line holds setup.py."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return next(block.splitlines() for block in blocks if "setup.py" in block.partition("\n")[0])


def named_paths(lines: list[str]) -> Iterator[tuple[Path, str]]:
    """Folder and pattern of all that the tree names.

    A folder's line names what is in it, below the folder of a less indented line: files by their names, modules of a package
    also without `.py`: `data/  documents (…), packing, loader`.
    """
    above = ROOT
    for line in lines:
        indented = line.startswith(" ")
        base = above if indented else ROOT
        first, *_ = line.split()
        if first.endswith("/"):
            yield base, first
            base = base / first
            if not indented:
                above = base
            elif not (rest := line.split(first, 1)[1]).strip().startswith("("):
                while "(" in rest:
                    rest = re.sub(r"\([^()]*\)", "", rest)
                yield from ((base, f"{word.strip()}.py") for word in rest.split(","))
        for word in WORD.findall(line.split(first, 1)[1] if first.endswith("/") else line):
            yield base, word


def test_what_the_tree_names() -> None:
    lines = [
        "setup.py LICENSE   LOG.md: notes",
        "a/",
        "  b.py  the b      c.py  the c",
        "  d/   e (f, (g)), h",
        "i/  j.sh test_*.py; k/: l.json of m",
    ]
    named = [(str(folder.relative_to(ROOT)), pattern) for folder, pattern in named_paths(lines)]
    assert named == [
        (".", "setup.py"), (".", "LICENSE"), (".", "LOG.md"), (".", "a/"), ("a", "b.py"), ("a", "c.py"), ("a", "d/"), ("a/d", "e.py"),
        ("a/d", "h.py"), (".", "i/"), ("i", "j.sh"), ("i", "test_*.py"), ("i", "k/"), ("i", "l.json"),
    ]  # fmt: skip


def test_the_readme_s_tree_is_there() -> None:
    named = list(named_paths(tree()))
    assert [f"{folder.relative_to(ROOT)}/{pattern}" for folder, pattern in named if not exists(folder, pattern)] == []


def exists(folder: Path, pattern: str) -> bool:
    # A folder's line may name what lies deeper: `configs/  …; models/: config.json of known models`.
    deep = folder not in (ROOT, PACKAGE) and PACKAGE not in folder.parents
    return folder.is_dir() and any(folder.rglob(pattern.strip("/")) if deep else folder.glob(pattern.strip("/")))


def test_the_readme_s_tree_names_every_module() -> None:
    named = {folder / pattern.strip("/") for folder, pattern in named_paths(tree())}
    assert [name_of(file) for file in MODULES if file not in named and file.name != "__init__.py"] == []
    scripts = {file for folder in ("launch", "configs", "tools") for file in (ROOT / folder).iterdir() if file.is_file()}
    assert sorted(scripts - named) == []


def test_readme_has_no_blank_left() -> None:
    """A place that was to be filled with output."""
    assert "@@" not in (ROOT / "README.md").read_text(encoding="utf-8")
