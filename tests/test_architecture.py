"""Imports point one way, and there is one loop with one backward and one step."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
# Each room may import the rooms before it. Rooms of one tuple stand side by side and do not see each other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "process", "sampled"),
    ("types",),
    ("rewards",),
    ("config",),
    ("data",),
    ("model",),
    ("losses",),
    ("generate",),
    ("metrics",),
    ("train",),
    ("stages",),
    ("report", "check", "verify", "export", "serve"),
    ("board", "pipeline"),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def modules() -> list[tuple[str, Path, ast.Module]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            found.append((room, path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_every_room_has_a_place() -> None:
    unknown = {room for room, _, _ in modules()} - set(RANK)
    assert not unknown, f"rooms without a place in the order: {unknown}"


def test_imports_point_up_the_page() -> None:
    wrong = []
    for room, path, tree in modules():
        for name in imported(tree):
            parts = name.split(".")
            if parts[0] != "tunesmith" or len(parts) < 2 or parts[1] not in RANK or parts[1] == room:
                continue
            if RANK[parts[1]] >= RANK[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_light_rooms_stay_light() -> None:
    heavy = ("torch", "transformers", "peft", "numpy", "matplotlib", "tokenizers", "safetensors")
    wrong = []
    for room, path, tree in modules():
        names = {n.split(".")[0] for node in tree.body for n in imported(node) if not isinstance(node, ast.If)}
        if room in ("errors", "types", "rewards", "config", "cli"):
            wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in heavy if name in names]
        if room == "losses":
            allowed = {"torch", "tunesmith", *sys.stdlib_module_names}
            wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in names - allowed]
    assert not wrong, wrong


def test_one_backward_and_one_optimizer_step() -> None:
    backward, step = [], []
    for _, path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                text = ast.unparse(node.func)
                if node.func.attr == "backward":
                    backward.append(str(path.relative_to(PACKAGE)))
                if text.endswith("optimizer.step"):
                    step.append(str(path.relative_to(PACKAGE)))
    assert backward == ["train/step.py"]
    assert step == ["train/step.py"]


def test_nothing_is_unpickled_or_evaluated() -> None:
    banned = {
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "np.load",
        "numpy.load",
        "yaml.load",
        "yaml.unsafe_load",
        "eval",
        "exec",
    }
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node.func)}"
        for _, path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in banned
    ]
    assert not wrong, wrong


def test_public_names_exist_and_are_documented() -> None:
    for name in tunesmith.__all__:
        value = getattr(tunesmith, name)
        assert name == "IGNORE_INDEX" or value.__doc__, name
