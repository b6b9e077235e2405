"""What imports what: the package alone, the old names, the arrows between the parts."""

import ast
import importlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_adalip

ROOT = Path(__file__).parents[1]

ALONE = {
    *("hf_adalip", "hf_adalip.version", "hf_adalip.layers", "hf_adalip.registry"),
    "hf_adalip.optim",
}
"""What `import hf_adalip` imports of ours: these, and what is in optim."""

DEPRECATED = {
    "hub": "publish",
    "doctor": "diagnose",
    "training": "recipe.image.training",
    "loop": "recipe.image.loop",
    "engines": "recipe.image.engines",
    "options": "recipe.image.options",
    "data": "recipe.image.data",
    "augment": "recipe.image.augment",
    "models": "recipe.image.models",
    "metrics": "recipe.image.metrics",
    "runs": "recipe.run",
    "checkpoints": "recipe.checkpoints",
    "integrations.recipes": "recipe.trainer",
}
"""Modules that have moved, and where to."""

LOW = {"errors", "files", "version", "as_main", "deprecated"}
"""Modules that import none of ours, or one another."""

MAY_IMPORT = {
    **dict.fromkeys(LOW, LOW),
    "optim": set(),
    "layers": {"optim"},
    "registry": {"optim", "layers"},
    "over": {"optim", "registry"},
    "monitor": {"optim", *LOW},
    "plots": {"monitor", *LOW},
    "diagnose": {"registry", "optim", "monitor", *LOW},
    "publish": {"registry", *LOW},
    "integrations": {"diagnose", "registry", "optim", "monitor", "plots", *LOW},
    "recipe": {"publish", "integrations", "diagnose", "registry", "monitor", *LOW},
    "experiments": {"recipe", "registry", "monitor", "plots", *LOW},
    "run": {"integrations", *LOW},
    "timm": {"integrations"},
    "cli": {"experiments", "registry", *LOW},
    "": {"optim", "registry", "version"},  # hf_adalip/__init__.py
    **{old: {new.partition(".")[0], *LOW} for old, new in DEPRECATED.items()},
}
"""What a part of the package may import of the others when it is imported."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted((ROOT / "hf_adalip").rglob("*.py"))}


def statements(body: list[ast.stmt], types: bool) -> Iterator[ast.stmt]:
    """Those that are run when the module is imported, or when its types are checked."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from statements(statement.body if types else statement.orelse, types)
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(statement, field, []), types)
        for handler in getattr(statement, "handlers", []):
            yield from statements(handler.body, types)


def imports(module: str, types: bool = False) -> set[str]:
    """The modules of ours that a module imports when it is imported (or its types checked)."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for statement in statements(ast.parse(path.read_text(encoding="utf-8")).body, types):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names if alias.name in MODULES}
        if isinstance(statement, ast.ImportFrom):
            source = statement.module or ""
            if statement.level:
                above = package.split(".")[: len(package.split(".")) - statement.level + 1]
                source = ".".join([*above, source] if source else above)
            if source in MODULES:
                submodules = {f"{source}.{alias.name}" for alias in statement.names}
                own = not submodules <= MODULES.keys()  # else only what is in the package is used
                found |= (submodules & MODULES.keys()) | ({source} if own else set())
    return found - {module}


def part(module: str) -> str:
    name = module.partition(".")[2]
    return name if name in DEPRECATED else name.partition(".")[0]


def test_there_are_no_circles() -> None:
    """But in optim, where modules may name one another's classes, not even of types."""
    assert "hf_adalip.optim.estimator" in imports("hf_adalip.optim.step")
    graph = {module: imports(module, part(module) != "optim") for module in MODULES}
    graph["hf_adalip"] -= {"hf_adalip.integrations.trainer", "hf_adalip.over"}  # of __getattr__
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_arrows_go_one_way(module: str) -> None:
    others = {part(other) for other in imports(module)} - {part(module)}
    assert others <= MAY_IMPORT[part(module)], f"of {sorted(imports(module))}"


def loaded(code: str) -> set[str]:
    """The modules that are there after this code, in a process of its own."""
    code = f"import sys\n{code}\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_the_package_imports_torch_and_the_optimizers_alone() -> None:
    new = loaded("import hf_adalip") - loaded("import torch")
    ours = {name for name in new if name.partition(".")[0] == "hf_adalip"}
    assert {name for name in ours if not name.startswith("hf_adalip.optim.")} == ALONE
    builtin = sys.stdlib_module_names | {"torch", "hf_adalip", "__future__"}
    others = {name.partition(".")[0] for name in new} - builtin
    assert not others & {
        *("accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "numpy", "PIL"),
        *("safetensors", "scipy", "sklearn", "timm", "tqdm", "transformers", "triton", "yaml"),
    }


@pytest.mark.slow
def test_what_is_for_trainer_is_there_when_it_is_asked_for() -> None:
    assert {"attach", "register", "trainer_kwargs"} <= set(dir(hf_adalip))
    assert set(hf_adalip.__all__) <= set(dir(hf_adalip))
    code = "import hf_adalip; assert callable(hf_adalip.trainer_kwargs)"
    assert "hf_adalip.integrations.trainer" in loaded(code)
    assert "hf_adalip.integrations.trainer" in loaded("from hf_adalip import *; attach, register")
    assert "hf_adalip.over" in loaded("from hf_adalip import LipschitzOver, SecantOver")
    with pytest.raises(AttributeError, match="module 'hf_adalip' has no attribute 'atach'"):
        hf_adalip.atach  # noqa: B018


@pytest.mark.parametrize(("old", "new"), DEPRECATED.items())
def test_a_deprecated_module_warns_and_has_what_it_had(old: str, new: str) -> None:
    if new.startswith("recipe"):
        pytest.importorskip("accelerate")
        pytest.importorskip("datasets")
        pytest.importorskip("transformers")
    sys.modules.pop(f"hf_adalip.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"import from hf_adalip.{new}$"):
        module = importlib.import_module(f"hf_adalip.{old}")
    found = importlib.import_module(f"hf_adalip.{new}")
    assert {name: getattr(found, name) for name in module.__all__} == {
        name: getattr(module, name) for name in module.__all__
    }


def test_arguments_that_were_pickled_before_they_moved_can_be_read(tmp_path: Path) -> None:
    """`training_args.bin` of a checkpoint, by whoever asks torch to run what is in it."""
    recipes = pytest.importorskip("hf_adalip.recipe.trainer")
    arguments = recipes.RecipeArguments(output_dir=str(tmp_path), use_cpu=True, seed=7)
    text = pickle.dumps(arguments, protocol=0)
    now = recipes.RecipeArguments.__module__.encode()
    assert now in text
    before = pickle.loads(text.replace(now, b"hf_adalip.integrations.recipes"))
    assert type(before) is recipes.RecipeArguments
    assert before.seed == 7
