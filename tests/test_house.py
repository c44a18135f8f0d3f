"""The house rules, read off the source: which part may import which, how long things may be, and
what has a type."""

import ast
from pathlib import Path

import pytest
from runs import ROOT, SCRIPTS

FLOORS = [
    {"utils", "pge"},
    {"files"},
    {"models", "data"},
    {"masking"},
    {"pruning", "evaluation"},
    {"training"},
]
LEVEL = {room: level for level, rooms in enumerate([*FLOORS, SCRIPTS]) for room in rooms}
ROOMS = {file.parent.name for file in ROOT.glob("*/__init__.py")}
OPTIONAL = {"matplotlib", "lm_eval", "datasets", "scipy"}
MOST_LINES = 320  # of a part of the product
MOST_BENCH_LINES = 300
MOST_FUNCTION_LINES = 60
MOST_BENCH_FUNCTION_LINES = 75
LINES = {"train.py": 260, "sparsify.py": 340}  # with their flags


def modules() -> dict[str, Path]:
    """Module name -> file, of the product code."""
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sorted(files)}


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def names_of(node: ast.AST) -> list[str]:
    """The modules that an import statement may mean: `from a import b` is a, and a.b if that is a
    module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def imports(file: Path, known) -> set[str]:
    """The modules of this project that a file imports, wherever in it."""
    return {name for node in ast.walk(tree(file)) for name in names_of(node) if name in known}


def functions(file: Path):
    return [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)]


def test_every_module_has_its_place():
    rooms = {name.partition(".")[0] for name in modules()}
    assert rooms == set(LEVEL)
    assert len(ROOMS) <= 6


@pytest.mark.parametrize("name", modules())
def test_arrows_run_down(name):
    """A room imports from its own floor or from below, and scripts import no scripts."""
    room = name.partition(".")[0]
    for imported in imports(modules()[name], modules()):
        other = imported.partition(".")[0]
        assert LEVEL[other] < LEVEL[room] or (other == room and room in ROOMS), (
            f"{name} imports {imported}"
        )


def test_there_is_no_circle():
    graph = {name: imports(file, modules()) - {name} for name, file in modules().items()}
    while graph:
        leaves = [name for name, imported in graph.items() if not imported & graph.keys()]
        assert leaves, f"these import one another in a circle: {sorted(graph)}"
        for name in leaves:
            del graph[name]


@pytest.mark.parametrize("name", modules())
def test_imports_inside_functions_are_of_optional_packages(name):
    for function in functions(modules()[name]):
        for node in ast.walk(function):
            for imported in names_of(node)[:1]:
                assert imported in OPTIONAL or imported.partition(".")[0] in OPTIONAL, (
                    f"{function.name}: {imported}"
                )


@pytest.mark.parametrize(
    "file",
    [
        *modules().values(),
        *sorted((ROOT / "bench").glob("*.py")),
        *sorted((ROOT / "reproduce").glob("*.py")),
    ],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_nothing_is_too_long(file):
    lines = file.read_text(encoding="utf-8").count("\n")
    is_bench = file.parent.name in ("bench", "reproduce")
    most = MOST_BENCH_LINES if is_bench else MOST_LINES
    assert lines <= LINES.get(file.name if file.parent == ROOT else "", most)
    longest = MOST_BENCH_FUNCTION_LINES if is_bench else MOST_FUNCTION_LINES
    for function in functions(file):
        assert function.end_lineno - function.lineno < longest, function.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_its_main_as_all_do(name):
    """So what other tests see of `main` in their own process holds in a shell."""
    assert (
        ast.unparse(tree(ROOT / f"{name}.py").body[-1])
        == "if __name__ == '__main__':\n    run_script(main)"
    )


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("bench", {"tests", "faults", "tiny", "masked", "exact", *SCRIPTS}),
        ("tests", {file.stem for file in (ROOT / "bench").glob("*.py")}),
    ],
)
def test_tests_and_benches_stay_apart(folder, forbidden):
    """A bench named like a test's helper, or the other way round, counts only where it is
    imported."""
    own = {file.stem for file in (ROOT / folder).rglob("*.py")}
    for file in (ROOT / folder).rglob("*.py"):
        found = {name.partition(".")[0] for node in ast.walk(tree(file)) for name in names_of(node)}
        assert not found & (forbidden - own), (
            f"{file.relative_to(ROOT)} imports {found & forbidden}"
        )


def test_args_stop_at_the_door():
    """Only the scripts, their flags in utils.py and training/arguments.py, and what starts a run
    for them know argparse or take an `args`."""
    for name, file in modules().items():
        if name in (*SCRIPTS, "utils", "training.arguments", "training.launch"):
            continue
        for node in ast.walk(tree(file)):
            assert "argparse" not in names_of(node), f"{name} imports argparse"
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert "args" not in [argument.arg for argument in given], f"{name} takes args"


def test_no_script_hides_a_library():
    """Tasks of lm-evaluation-harness import Hugging Face's `evaluate`, with our folder first on the
    path."""
    assert not list(ROOT.glob("evaluate*"))
