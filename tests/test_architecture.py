"""Structure that no reader should have to check by eye: import rules, budgets, mirrored tests, README's file map.

`pyproject.toml` states most import rules as contracts too; here they also cover parts of third-party packages, which
contracts cannot name, and what a fresh interpreter actually loads.
"""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llava_core", "deployments", "cluster")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES = 300
MAX_MEDIAN_FUNCTION_LINES = 10
MAX_P90_FUNCTION_LINES = 40
# For one request of the engine, the engine's thread, one request of the gateway, one of many metrics; and for what
# itself raises Exception: the tokenizers library, and Ray's start, of a service's Ray and of a job's.
MAX_BROAD_EXCEPTS = 7

SERVICE = {"ray", "fastapi", "gradio", "pydantic", "starlette", "uvicorn"}
TENSORS = {"torch", "transformers", "accelerate", "safetensors"}
# Module or package → what neither it nor anything in it may import, at any depth.
FORBIDDEN = {
    "llava_core": SERVICE | {"deployments", "cluster", "tests", "benchmarks", "examples"},
    "llava_core.prompts": TENSORS | {"numpy", "PIL"},
    "llava_core.images.geometry": TENSORS | {"numpy", "PIL"},
    "llava_core.images": {"transformers", "llava_core.vision", "llava_core.engine", "llava_core.models"},
    "llava_core.vision": {"llava_core.prompts", "llava_core.models", "llava_core.engine", "llava_core.checkpoints"},
    "llava_core.models": {"llava_core.checkpoints", "llava_core.engine", "llava_core.training", "llava_core.vision"},
    "llava_core.checkpoints": {"llava_core.engine", "llava_core.training", "llava_core.evaluation"},
    "llava_core.engine": {
        "llava_core.checkpoints",
        "llava_core.training",
        "llava_core.evaluation",
        "llava_core.images",
    },
    "llava_core.engine.blocks": TENSORS,
    "llava_core.engine.request": TENSORS,
    "llava_core.engine.scheduler": TENSORS,
    "llava_core.training": {"llava_core.evaluation", "llava_core.cli", "llava_core.engine"},
    "llava_core.evaluation": TENSORS | {"llava_core.models", "llava_core.engine", "llava_core.vision"},
    "deployments": {"cluster", "tests", "benchmarks", "examples", "ray.train", "ray.data", "fastapi"},
    "cluster": {"deployments", "tests", "benchmarks", "examples", "fastapi", "gradio"},
    "benchmarks": {"cluster", "tests", "examples"},
}
STDLIB_ONLY = {
    f"llava_core.{name}" for name in ("types", "errors", "fields", "architectures", "config", "lru", "views")
}
STDLIB_ONLY_MAY = STDLIB_ONLY - {"llava_core.config"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> set[str]:
    """Return every module a file imports, at any depth, except those only for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import module` may import either.
            found.update({str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(path))
    return found


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def loaded_by(code: str, *names: str) -> list[str]:
    """Return which of these modules a fresh interpreter has loaded after running the code."""
    script = f"{code}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS], ids=module_name)
def test_nothing_forbidden_is_imported(path: Path) -> None:
    for package, forbidden in FORBIDDEN.items():
        if is_within(module_name(path), package):
            wrong = {name for name in imports(path) if any(is_within(name, other) for other in forbidden)}
            assert not wrong, f"{module_name(path)} may not import {sorted(wrong)}"


@pytest.mark.parametrize("module", sorted(STDLIB_ONLY))
def test_basic_modules_need_only_the_standard_library(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    foreign = {
        name
        for name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(is_within(name, allowed) for allowed in STDLIB_ONLY_MAY)
    }
    assert not foreign


def test_importing_the_core_and_its_light_modules_does_not_load_torch() -> None:
    light = "import llava_core, llava_core.prepare, llava_core.checkpoints.describe, llava_core.engine.request"
    assert loaded_by(light, "torch", *SERVICE) == []


def test_the_commands_load_without_torch_or_a_service() -> None:
    assert loaded_by("import llava_core.cli", "torch", "transformers", *SERVICE) == []


def test_the_client_loads_no_model_libraries() -> None:
    assert loaded_by("import llava_core.client", "torch", "transformers", "PIL", "numpy", *SERVICE) == []


@pytest.mark.skipif(not (ROOT / "deployments" / "gateway.py").exists(), reason="there is no gateway yet")
def test_importing_the_gateway_does_not_load_torch() -> None:
    assert loaded_by("import deployments.gateway", "torch") == []


def test_core_modules_import_without_a_service_and_configure_no_logging() -> None:
    code = (
        "import sys, logging, importlib, pkgutil\n"
        # As if they were not installed: importing one of them fails.
        f"sys.modules.update(dict.fromkeys({sorted(SERVICE)!r}))\n"
        "import llava_core\n"
        "for found in pkgutil.walk_packages(llava_core.__path__, 'llava_core.'):\n"
        "    importlib.import_module(found.name)\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('llava_core').handlers"
    )
    assert "llava_core.cli" in loaded_by(code, "llava_core.cli")


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS], ids=module_name)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines: a file that long has two subjects, split it by subject"


def test_functions_are_short() -> None:
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for path in FILES for node in functions(path)]
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES
    assert statistics.quantiles(lengths, n=10)[-1] <= MAX_P90_FUNCTION_LINES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_has_a_mirrored_test_file(path: Path) -> None:
    if path.stem in ("__init__", "__main__"):
        return
    mirrored = ROOT / "tests" / path.relative_to(ROOT).with_name(f"test_{path.name}")
    assert mirrored.exists(), f"write {mirrored.relative_to(ROOT)}"


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS, *TEST_FILES], ids=module_name)
def test_every_file_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "the file has no docstring"


def test_settings_have_their_defaults_in_one_place() -> None:
    wrong = [
        f"{module_name(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and len(node.args) == 3
        and re.search("config|settings|options|spec|params", ast.unparse(node.args[0]))
    ]
    assert not wrong, "a default in getattr(config, name, default) is a second opinion about a setting"


def test_weights_are_never_loaded_partially() -> None:
    wrong = [
        f"{module_name(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("load_state_dict")
        and any(keyword.arg == "strict" and ast.unparse(keyword.value) == "False" for keyword in node.keywords)
    ]
    assert not wrong


def test_broad_excepts_are_few() -> None:
    broad = [
        f"{module_name(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    silenced = sum(path.read_text(encoding="utf-8").count("noqa: BLE001") for path in FILES)
    assert len(broad) <= MAX_BROAD_EXCEPTS, broad
    assert silenced <= MAX_BROAD_EXCEPTS


def test_the_readmes_file_map_matches_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## File map", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([\w/]+\.py)`.* \| (.+) \|$", section, flags=re.MULTILINE)
    files = [path for path in (*FILES, *(ROOT / "benchmarks").rglob("*.py")) if path.name != "__init__.py"]
    assert len(rows) == len(dict(rows)), "a file is listed twice"
    assert dict(rows) == {str(path.relative_to(ROOT)): _summary(path) for path in files}


def _summary(path: Path) -> str:
    """Return the first sentence of a file's docstring, up to its colon where it is long."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(re.split(r"(?<=[.?!])\s", docstring)[0].removesuffix(".").split())
    return sentence if len(sentence) <= 120 else sentence.split(": ")[0]
