"""Each optimizer: the loss falls, a resumed run is bit-equal, and what is ours does what its paper says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from tests.conftest import tunesmith
from tunesmith.config.arguments import FinetuningArguments, TrainingArguments
from tunesmith.config.load import load_config
from tunesmith.config.optimizers import OPTIMIZERS, OptimizerName
from tunesmith.errors import ConfigError
from tunesmith.stages.run import build_trainer
from tunesmith.train.checkpoint import OPTIMIZER, TrainerState, checkpoint_path, load_state, save_state
from tunesmith.train.optimizer import build_optimizer, build_schedule
from tunesmith.train.progress import SilentReporter
from tunesmith.train.runlog import read_log
from tunesmith.train.trainer import PeftTrainer

ALIASES = {"lion": "lion_32bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}
LIKE_OTHERS = {
    "adamw_torch_fused", "adagrad", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb",
    "rmsprop_bnb_32bit", "schedule_free_adamw",
}  # fmt: skip
"""Run in the slow tier; another test or optimizer has the same code."""
RATES = {"sgd": 0.3, "schedule_free_sgd": 1.0, "schedule_free_radam": 0.03, "adagrad": 0.02, "rmsprop_bnb": 0.002}


@pytest.fixture
def start(settings: dict[str, Any], write_config: Any) -> Any:
    """Make a trainer of the tiny model, all weights trained, into a run folder of that name."""

    def build(name: str, **changes: Any) -> PeftTrainer:
        run = Path(settings["output_dir"]).parent / name
        run.mkdir(exist_ok=True)
        values = {**settings, "finetuning_type": "full", "per_device_train_batch_size": 8, "learning_rate": 3e-3}
        config, _ = load_config(write_config({**values, **changes, "output_dir": str(run)}))
        return build_trainer(config, SilentReporter())[0]

    return build


def weights(trainer: PeftTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_every_name_is_in_the_table() -> None:
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)


@pytest.mark.parametrize(
    "optim",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in OPTIMIZERS if name not in ALIASES],
)
def test_the_loss_falls_and_a_resumed_run_is_bit_equal(start: Any, optim: str) -> None:
    """In the middle of a subspace of the projecting ones, with 8-bit states where there are any."""
    values: dict[str, Any] = {"optim": optim, "max_steps": 12, "save_steps": 6, "weight_decay": 0.01}
    values["learning_rate"] = RATES.get(optim, 3e-3)
    if OPTIMIZERS[optim].projects:
        values["optim_args"] = "rank=8, update_proj_gap=4"
    unbroken = start("run", **values)
    unbroken.train()
    losses = [entry["loss"] for entry in read_log(unbroken.given.run)]
    assert losses[-1] < 0.8 * losses[0]
    checkpoint = checkpoint_path(unbroken.given.run, 6)
    kept = load_file(checkpoint / OPTIMIZER)
    last = load_file(checkpoint_path(unbroken.given.run, 12) / OPTIMIZER)
    assert any(t.dtype == torch.uint8 and not name.startswith("rng") for name, t in kept.items()) == optim.endswith("8bit")
    resumed = start("run", **values)
    resumed.train(checkpoint)
    assert_same(weights(unbroken), weights(resumed))
    assert_same(last, load_file(checkpoint_path(resumed.given.run, 12) / OPTIMIZER))


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("linear", {}), ("cosine", {}), ("cosine_with_restarts", {"num_cycles": 2}), ("polynomial", {"power": 2.0}),
        ("constant", {}), ("constant_with_warmup", {}), ("inverse_sqrt", {}), ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("warmup_stable_decay", {"num_decay_steps": 3}),
    ],
)  # fmt: skip
def test_every_schedule_goes_on_where_it_was(tmp_path: Path, kind: str, kwargs: dict[str, Any]) -> None:
    warmup = 0 if kind == "constant" else 2
    values: dict[str, Any] = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup}
    args = TrainingArguments(output_dir="x", learning_rate=RATE, **values)

    def begin() -> tuple[torch.optim.Optimizer, Any]:
        model = Layers()
        optimizer = build_optimizer(args, FinetuningArguments(), model, dict(model.named_parameters()))
        return optimizer, build_schedule(args, optimizer, 12)

    def rates(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    optimizer, schedule = begin()
    first = rates(optimizer, schedule, 5)
    save_state(tmp_path, TrainerState(step=5), optimizer, schedule, None)
    rest = rates(optimizer, schedule, 7)
    assert max(first) == RATE
    assert (first[0] == 0) == bool(warmup)
    assert (len(set(rest)) == 1) == kind.startswith("constant")
    again, schedule = begin()
    load_state(tmp_path, again, schedule, None)
    assert rates(again, schedule, 7) == rest


# ---- against the papers

SHAPES = {"wide": (3, 5), "tall": (6, 2), "bias": (4,)}
BETAS, EPS, RATE, DECAY = (0.9, 0.99), 1e-8, 0.01, 0.1


class Layers(torch.nn.Module):
    """Two linear layers and a bias with the shapes above, and an embedding beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wide = torch.nn.Linear(5, 3, bias=False)
        self.tall = torch.nn.Linear(2, 6, bias=False)
        self.table = torch.nn.Embedding(7, 4)
        self.bias = torch.nn.Parameter(torch.randn(4))


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = {"wide.weight": (3, 5), "tall.weight": (6, 2), "table.weight": (7, 4), "bias": (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def follow(optim: str, steps: int, **changes: Any) -> tuple[dict[str, np.ndarray], torch.optim.Optimizer, Layers]:
    """Weights before, the optimizer and the model after ``steps`` updates with known gradients."""
    model = Layers()
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    values = {"learning_rate": RATE, "weight_decay": DECAY, **changes}
    if "adam_beta1" in OPTIMIZERS[optim].heeds:
        values |= {"adam_beta1": BETAS[0], "adam_beta2": BETAS[1]}
    args = TrainingArguments(output_dir="x", optim=optim, **values)
    optimizer = build_optimizer(args, FinetuningArguments(), model, dict(model.named_parameters()))
    if OPTIMIZERS[optim].averages:
        optimizer.train()  # type: ignore[attr-defined]
    for step in range(steps):
        for name, gradient in gradients(step).items():
            model.get_parameter(name).grad = gradient.clone()
        optimizer.step()
    return before, optimizer, model


def assert_weights(model: Layers, expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(
            model.get_parameter(name).detach().numpy(), value, rtol=tolerance, atol=tolerance, err_msg=name
        )


def decay_of(name: str) -> float:
    return 0.0 if name == "bias" else DECAY


def adam(state: dict[str, Any], g: np.ndarray) -> np.ndarray:
    """Adam's bias-corrected direction, as its paper has it."""
    state["t"] = state.get("t", 0) + 1
    state["m"] = BETAS[0] * state.get("m", 0) + (1 - BETAS[0]) * g
    state["v"] = BETAS[1] * state.get("v", 0) + (1 - BETAS[1]) * g * g
    first, second = state["m"] / (1 - BETAS[0] ** state["t"]), state["v"] / (1 - BETAS[1] ** state["t"])
    return first / (np.sqrt(second) + EPS)


def test_lion_is_that_of_the_paper() -> None:
    weight, _, model = follow("lion_32bit", 6)
    for name, w in weight.items():
        m = np.zeros_like(w)
        for step in range(6):
            g = gradients(step)[name].double().numpy()
            w -= RATE * (np.sign(BETAS[0] * m + (1 - BETAS[0]) * g) + decay_of(name) * w)
            m = BETAS[1] * m + (1 - BETAS[1]) * g
    assert_weights(model, weight)


def test_galore_is_that_of_the_paper() -> None:
    """Subspaces of rank 2 taken anew at updates 1 and 4; the embedding and the bias by plain AdamW."""
    options = {"rank": 2, "update_proj_gap": 3, "scale": 0.5}
    early = follow("galore_adamw", 1, optim_args=options)
    weight, optimizer, model = follow("galore_adamw", 6, optim_args=options)
    for name, w in weight.items():
        state: dict[str, Any] = {}
        for step in range(6):
            g = gradients(step)[name].double().numpy()
            if name in ("wide.weight", "tall.weight"):
                wide = g.shape[0] <= g.shape[1]
                if step % 3 == 0:
                    left, _, right = np.linalg.svd(g, full_matrices=False)
                    leading = left[:, :2] if wide else right[:2].T
                    found, layers = early[1:] if step == 0 else (optimizer, model)
                    basis = found.state[layers.get_parameter(name)]["basis"].double().numpy()  # as leading, but for signs
                    np.testing.assert_allclose(np.abs(leading.T @ basis), np.eye(2), atol=1e-4)
                direction = 0.5 * (basis @ adam(state, basis.T @ g) if wide else adam(state, g @ basis) @ basis.T)
            else:
                direction = adam(state, g)
            w -= RATE * (direction + decay_of(name) * w)
    assert_weights(model, weight, 1e-4)
    assert optimizer.state[model.wide.weight]["exp_avg"].shape == (2, 5)
    assert optimizer.state[model.tall.weight]["exp_avg"].shape == (6, 2)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_is_that_of_the_paper(scale_type: str) -> None:
    torch.manual_seed(5)
    options = {"rank": 2, "update_proj_gap": 100, "scale": 4.0, "scale_type": scale_type}
    weight, optimizer, model = follow("apollo_adamw", 4, optim_args=options)
    for name in ("wide.weight", "tall.weight"):
        w, p = weight[name], model.get_parameter(name)
        wide = p.shape[0] <= p.shape[1]
        generator = torch.Generator().manual_seed(optimizer.state[p]["seed"])
        size = (2, p.shape[0]) if wide else (p.shape[1], 2)
        projection = torch.randn(size, generator=generator).double().numpy() / np.sqrt(2)
        state: dict[str, Any] = {}
        length = None
        for step in range(4):
            g = gradients(step)[name].double().numpy()
            low = projection @ g if wide else g @ projection
            direction = adam(state, low)
            if scale_type == "channel":
                axis = 0 if wide else 1
                factor = np.linalg.norm(direction, axis=axis, keepdims=True) / np.linalg.norm(low, axis=axis, keepdims=True)
            else:
                factor = np.linalg.norm(direction) / np.linalg.norm(low)
            update = g * factor
            if length is not None and np.linalg.norm(update) > 1.01 * length:
                update *= 1.01 * length / np.linalg.norm(update)
            length = np.linalg.norm(update)
            w -= RATE * (2.0 * update + DECAY * w)
        assert_weights(model, {name: w})


def test_muon_has_the_matrices_and_adamw_the_rest() -> None:
    _, _, model = follow("muon", 4, optim_args={"momentum": 0.9})
    twin = Layers()
    muon = torch.optim.Muon(
        [twin.wide.weight, twin.tall.weight], lr=RATE, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    rest = [{"params": [twin.table.weight], "weight_decay": DECAY}, {"params": [twin.bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=RATE, betas=BETAS, eps=EPS)
    for step in range(4):
        for name, gradient in gradients(step).items():
            twin.get_parameter(name).grad = gradient
        muon.step()
        adamw.step()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize(
    ("library", "known"),
    [("paged_adamw_32bit", "adamw_torch"), ("paged_lion_32bit", "lion_32bit"), ("rmsprop_bnb_32bit", "rmsprop")],
)
def test_the_library_computes_what_is_known(library: str, known: str) -> None:
    """Both with weight decay: decoupled, or for RMSprop added to the gradient."""
    one, other = follow(library, 5)[2], follow(known, 5)[2]
    assert_weights(one, {name: p.detach().numpy() for name, p in other.named_parameters()}, 1e-4)


def test_schedule_free_sgd_is_that_of_the_paper() -> None:
    """y = (1 - b) z + b x; z -= rate * (g + decay * y); x is the mean of z (arXiv 2405.15682, equations 3 to 5)."""
    weight, optimizer, model = follow("schedule_free_sgd", 5, optim_args="momentum=0.8")
    optimizer.eval()  # type: ignore[attr-defined]
    for name, w in weight.items():
        z, x = w.copy(), w.copy()
        for step in range(5):
            y = 0.2 * z + 0.8 * x
            z -= RATE * (gradients(step)[name].double().numpy() + decay_of(name) * y)
            x += (z - x) / (step + 1)
        weight[name] = x
    assert_weights(model, weight)


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd"])
def test_saving_and_evaluating_do_not_touch_schedule_free_training(start: Any, optim: str) -> None:
    """However often the average is put in place, training goes on bit by bit; what is saved and left is the average."""
    values = {"optim": optim, "max_steps": 6, "learning_rate": RATES.get(optim, 3e-3), "val_size": 4}
    seldom = start("seldom", save_strategy="no", eval_steps=100, **values)
    seldom.train()
    often = start("often", save_steps=1, eval_steps=1, **values)
    often.train()
    assert_same(weights(seldom), weights(often))
    final = load_file(checkpoint_path(often.given.run, 6) / "trainable.safetensors")
    assert_same(weights(often), final)
    at_training_point = load_file(checkpoint_path(often.given.run, 6) / OPTIMIZER)
    assert any(name.endswith("training_point") for name in at_training_point)
    logged = [entry["eval_loss"] for entry in read_log(often.given.run) if "eval_loss" in entry]
    assert often.evaluate()["eval_loss"] == pytest.approx(logged[-1], rel=1e-6)


# ---- LoRA+ and configuration


def test_loraplus_gives_b_matrices_their_own_rate(start: Any) -> None:
    lora = {"finetuning_type": "lora", "loraplus_lr_ratio": 16, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    trainer = start("plus", max_steps=2, save_steps=1, weight_decay=0.1, **lora)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {16e-3}
    assert {rate for name, rate in rates.items() if ".lora_A." in name} == {1e-3}
    theirs = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert rates == {names[id(p)]: group["lr"] for group in theirs.param_groups for p in group["params"]}
    trainer.train()
    assert [entry["learning_rate"] for entry in read_log(trainer.given.run)] == [1e-3, 1e-3]
    resumed = start("plus", max_steps=2, save_steps=1, weight_decay=0.1, **lora)
    resumed.train(checkpoint_path(trainer.given.run, 1))
    assert_same(weights(trainer), weights(resumed))
    with pytest.raises(ConfigError, match="loraplus_lr_embedding: no embedding has an adapter"):
        start("plus", loraplus_lr_embedding=1e-5, **lora)


def test_targets_are_named_by_parts_of_names(start: Any) -> None:
    trainer = start("run", optim="galore_adamw", optim_args={"rank": 4}, optim_target_modules="mlp, layers.0.self_attn.q_proj")
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    projected = {names[id(p)] for g in trainer.optimizer.param_groups if g.get("rank") == 4 for p in g["params"]}
    mlp = {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")}
    assert projected == mlp | {"model.layers.0.self_attn.q_proj.weight"}
    with pytest.raises(ConfigError, match=r"optim_target_modules: proj: no such linear layer.*q_proj"):
        start("run", optim="galore_adamw", optim_target_modules="proj")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1: sgd does not use it"),
        ({"optim": "lion_8bit", "adam_epsilon": 1e-6}, "adam_epsilon: lion_8bit does not use it"),
        ({"optim": "adamw_torch", "optim_args": "rank=8"}, "optim_args: adamw_torch has no option rank; it has none"),
        ({"optim": "muon", "optim_args": {"ns_steps": 2.5}}, "optim_args: ns_steps: expected a whole number, at least 1, at most 99"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args: nesterov needs momentum"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args: Value error, expected a mapping, or key=value pairs"),
        ({"optim": "apollo_adamw", "optim_args": "scale_type=row"}, "scale_type: expected channel or tensor, found 'row'"),
        ({"optim": "galore_adamw"}, "optim: galore_adamw projects the gradients of whole matrices"),
        ({"optim_target_modules": "q_proj"}, "optim_target_modules: adamw_torch projects nothing"),
        ({"optim": "schedule_free_adamw", "lr_scheduler_type": "cosine"}, "lr_scheduler_type: schedule_free_adamw averages"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "warmup_ratio: lr_scheduler_type: constant does not warm up"),
        ({"finetuning_type": "full", "loraplus_lr_ratio": 16}, "loraplus_lr_ratio: has no meaning with finetuning_type: full"),
        ({"loraplus_lr_embedding": 1e-6}, "loraplus_lr_embedding: is part of LoRA+"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(
    settings: dict[str, Any], write_config: Any, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config({**settings, **changes}))
    assert expected in str(caught.value)


def test_a_missing_library_is_named_with_its_extra(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"optim: adamw_8bit needs the package bitsandbytes.*pip install 'tunesmith\[optim\]'"
    ):
        load_config(write_config({**settings, "optim": "adamw_8bit"}))


@pytest.mark.parametrize(("warmup", "schedule"), [({}, "constant"), ({"warmup_steps": 3}, "constant_with_warmup")])
def test_schedule_free_has_no_schedule(
    settings: dict[str, Any], write_config: Any, warmup: dict[str, int], schedule: str
) -> None:
    config, _ = load_config(write_config({**settings, **warmup, "optim": "schedule_free_adamw"}))
    assert config.training.lr_scheduler_type == schedule


def test_through_the_command_line(settings: dict[str, Any], write_config: Any) -> None:
    """Killed after three of six updates and resumed: the adapter is that of the unbroken run, to the bit."""
    asked = {"optim": "schedule_free_adamw", "neftune_noise_alpha": 5, "loraplus_lr_ratio": 4, "lora_dropout": 0.1}
    config = write_config({**settings, **asked, "max_steps": 6, "save_steps": 3})
    whole = Path(settings["output_dir"])
    tunesmith("train", config)
    broken = whole.with_name("broken")
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-6")
    (broken / "adapter_model.safetensors").unlink()
    tunesmith("train", config, f"output_dir={broken}", "resume_from_checkpoint=auto")
    assert_same(load_file(whole / "adapter_model.safetensors"), load_file(broken / "adapter_model.safetensors"))
    assert json.loads((broken / "train_results.json").read_text())["steps"] == 6
