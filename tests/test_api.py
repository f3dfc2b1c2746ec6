"""The shape of the package: public names, import directions, banned patterns, sizes. Read from the source."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import headwise

ROOT = Path(headwise.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
LEAFS = ("version", "errors", "spec", "artifacts", "tolerances")
ORDER = (*LEAFS, "device", "model", "calibration", "passes", "export", "gates", "pipeline", "demo", "cli", "__main__")
"""A part imports parts before it. The leafs know nothing of the others."""
BEFORE_PIPELINE = {"export": {"passes"}, "gates": {"passes"}}
"""Parts that come earlier but are none of the business of these: an export does not know which pass it follows."""
BESIDE_THE_RUN = {"bench", "bundle", "commands", "regression"}
"""Folders of pipeline/ that use the run and its report, and neither each other nor are used by these."""
LONGEST_FILE, LONGEST_FUNCTION, MOST_POSITIONAL = 330, 60, 6
"""Lines, lines without signature and docstring, parameters; those of ``forward`` and of commands are given."""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imports(path: Path) -> set[str]:
    """The modules that a file imports, those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def lines_with(pattern: str, *, allowed: tuple[str, ...]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()}"
        for path, name in zip(FILES, NAMES, strict=True)
        if not name.startswith(allowed)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line)
    ]


def test_public_names_are_these() -> None:
    expected = ["Checkpoint", "HeadwiseError", "ModelView", "Recipe", "Run", "compress", "load", "load_recipe"]
    assert sorted(headwise.__all__) == expected
    for name in headwise.__all__:
        assert getattr(headwise, name).__doc__, name
        assert name in dir(headwise)
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        headwise.prune  # noqa: B018
    bound = {node.name for node in tree(ROOT / "__init__.py").body if isinstance(node, ast.FunctionDef)}
    assert bound == {"__getattr__", "__dir__"}, "nothing else is public"


def test_names_resolve_to_what_type_checkers_see() -> None:
    checked = next(n for n in tree(ROOT / "__init__.py").body if isinstance(n, ast.If))
    seen = {
        (alias.asname or alias.name): (node.module, alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == headwise._HOMES


def test_every_error_is_documented_and_has_an_exit_code() -> None:
    from headwise import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.HeadwiseError)]
    assert len(classes) > 10
    for error in classes:
        assert error.__doc__
        assert error.exit_code in (1, 2, 3, 4)
        assert str(error("a", expected="b", fix="c")) == "a\n  expected: b\n  do this:  c"


@pytest.mark.parametrize("name", NAMES)
def test_import_direction(name: str) -> None:
    path = ROOT / name
    here = part(path)
    if here == "__init__":
        return
    known = set(ORDER[: ORDER.index(here) + 1]) if here not in LEAFS else set(LEAFS)
    known -= BEFORE_PIPELINE.get(here, set())
    for module in imports(path):
        if module.startswith("headwise."):
            assert module.split(".")[1] in known, f"{name} imports {module}"
        else:
            assert module != "headwise", f"{name} imports the public names"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("pipeline/")])
def test_folders_of_the_pipeline(name: str) -> None:
    """The run uses the report and the quantize stage, the other folders use all that, and the report nothing."""
    inner = Path(name).parts[1:-1]
    here = inner[0] if inner else "run"
    for module in imports(ROOT / name):
        if module.startswith("headwise.pipeline."):
            there = module.split(".")[2]
            assert there == here or there not in BESIDE_THE_RUN, f"{name} imports {module}"
            assert there == here or here != "report", f"{name} imports {module}"


def test_every_part_is_in_the_order() -> None:
    assert {part(path) for path in FILES} - {"__init__"} == set(ORDER)


def test_leafs_are_light() -> None:
    for leaf in LEAFS:
        heavy = {module.split(".")[0] for module in imports(ROOT / f"{leaf}.py")} & {"torch", "numpy", "transformers"}
        assert not heavy, f"{leaf} imports {heavy}"


@pytest.mark.parametrize(
    "pattern", [r"layers\[0\]", r"num_attention_heads", r"\bmodel\.config\.num_", r"\.config\.num_"]
)
def test_layers_differ_so_nobody_asks_the_config_for_head_counts(pattern: str) -> None:
    assert lines_with(pattern, allowed=("model/families/", "model/view.py")) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("device/")])
def test_the_device_has_numpy_and_click_only(name: str) -> None:
    """Runtimes are imported by name, where they are needed; headwise's own modules are those that go to the device."""
    own = {"headwise.device", "headwise.errors", "headwise.artifacts"}
    for module in imports(ROOT / name):
        first = module.partition(".")[0]
        if first == "headwise":
            assert any(module == part or module.startswith(f"{part}.") for part in own), f"{name} imports {module}"
        else:
            assert first in sys.stdlib_module_names | {"numpy", "click"}, f"{name} imports {module}"


def test_only_two_files_import_tensorrt() -> None:
    allowed = ("device/runtimes.py", "device/engine_worker.py")
    assert lines_with(r"^\s*(import|from) (tensorrt|tensorrt_rtx)\b", allowed=allowed) == []
    assert lines_with(r"import_module\(.*(tensorrt|MODULES)", allowed=allowed) == []


def test_only_surgery_changes_weights() -> None:
    writes = r"nn\.Parameter\(|register_parameter\(|\.copy_\(|\.weight\.data|\.bias\.data|\.weight = |\.bias = "
    assert lines_with(writes, allowed=("model/surgery.py", "model/writing.py", "model/attention.py", "demo/")) == []


def test_nothing_is_left_for_later() -> None:
    assert (
        lines_with(
            r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b|breakpoint\(|(?<![.\w])print\(",
            allowed=("device/engine_worker.py",),
        )
        == []
    )


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str) -> None:
    path = ROOT / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    for function in functions(path):
        first = function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0].lineno
        length = (function.end_lineno or 0) - first + 1
        assert length <= LONGEST_FUNCTION, f"{name}: {function.name} has {length} lines"
        positional = [a.arg for a in (*function.args.posonlyargs, *function.args.args) if a.arg not in ("self", "cls")]
        given = function.name == "forward" or any("command" in ast.unparse(d) for d in function.decorator_list)
        assert given or len(positional) <= MOST_POSITIONAL, f"{name}: {function.name} takes {len(positional)}"


@pytest.mark.parametrize("name", NAMES)
def test_functions_say_what_they_return(name: str) -> None:
    for function in functions(ROOT / name):
        assert function.returns is not None, f"{name}: {function.name}"


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_public_things_are_documented(name: str) -> None:
    module = tree(ROOT / name)
    assert ast.get_docstring(module), name
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}: {node.name}"


def module_of(name: str) -> str:
    return ("headwise." + name.removesuffix(".py").replace("/", ".")).removesuffix(".__init__")


def first_imports(path: Path, modules: set[str]) -> set[str]:
    """What importing the file imports: not what its functions do later, and not what only type checkers see."""
    found: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # A submodule of a package does not wait for the names of the package.
            found |= inner & modules or {str(node.module)}
    return found


def test_every_module_can_be_imported_first() -> None:
    """There is no circle among imports, so that it does not matter which module comes first."""
    modules = {module_of(name): path for name, path in zip(NAMES, FILES, strict=True)}
    graph = {module: (first_imports(path, set(modules)) & set(modules)) - {module} for module, path in modules.items()}
    assert sum(map(len, graph.values())) > 100
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(modules)
    for module in sorted(set(modules) - {"headwise.__main__"}):
        importlib.import_module(module)
