import copy
import dataclasses
import math

import pytest
import torch
from conftest import LinearEncoder

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.errors import TrainingError, UserError
from contrastive_mm.methods import METHODS, MoCo, MoCoConfig, SimCLR, get_method
from contrastive_mm.metrics import read_metrics
from contrastive_mm.training import (
    Trainer,
    TrainerConfig,
    Updater,
    build_optimizer,
    make_accelerator,
    scheduled_rate,
)
from contrastive_mm.views import RandomStream, Views

DATA = torch.randn(32, 6, generator=torch.Generator().manual_seed(5))


class NoisyViews:
    """Two noisy copies, from a random stream of their own."""

    def __init__(self, seed=0):
        self.stream = RandomStream(seed)

    def __call__(self, batch):
        x, generator = batch["x"], self.stream.on(batch["x"].device)
        views = tuple(x + 0.1 * torch.randn(x.shape, generator=generator) for _ in range(2))
        index = batch.get("index", torch.arange(len(x)))
        return Views(views, sample_ids=index, labels=index % 4)

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)


def make_trainer(folder, name="simclr", **options):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(LinearEncoder(), torch.nn.Dropout(0.2))
    encoder.feature_dim = 8
    method = get_method(name)(encoder)
    batches = ShuffledBatches(len(DATA), 8, lambda rows: {"x": DATA[rows], "index": rows})
    config = TrainerConfig(**{"steps": 12, "log_every": 1, "checkpoint_every": 5, **options})
    return Trainer(method, NoisyViews(), batches, config, folder)


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in METHODS), ("simclr", {"chunk_size": 3})])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, name, options):
    whole = make_trainer(tmp_path / "whole", name, **options)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", name, **options)
    real_step, stopped_at = stopped.updater.step, 7

    def step(batch):
        if stopped.step == stopped_at:
            raise KeyboardInterrupt
        return real_step(batch)

    stopped.updater.step = step
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    torch.rand(100)
    resumed = make_trainer(tmp_path / "stopped", name, **options)
    resumed.train(resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for mine, other in zip(resumed.method.state_dict().values(), whole.method.state_dict().values(), strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    make_trainer(tmp_path / "a").train()
    make_trainer(tmp_path / "b").train(resume=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_finished_run_resumes_to_nothing(tmp_path):
    make_trainer(tmp_path).train()
    before = losses(tmp_path)
    assert make_trainer(tmp_path).train(resume=True)["steps"] == 12
    assert losses(tmp_path) == before


def test_resume_with_another_length_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(UserError, match="run of 12 steps, this one has 20"):
        make_trainer(tmp_path, steps=20).train(resume=True)


@pytest.mark.parametrize(("before", "after"), [("adamw", "sgd"), ("sgd", "adamw")])
def test_resume_with_another_optimizer_is_refused(tmp_path, before, after):
    make_trainer(tmp_path, optimizer=before).train()
    with pytest.raises(UserError, match=f"the optimizer {before}, which {after} can't go on.* --optimizer {before}"):
        make_trainer(tmp_path, optimizer=after).train(resume=True)


@pytest.mark.parametrize("content", [{"step": 3}, [1, 2], torch.ones(2)])
def test_a_file_of_other_origin_is_no_checkpoint(tmp_path, content):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(content, folder / "step-000000003.pt")
    trainer = make_trainer(tmp_path)
    before = copy.deepcopy(trainer.method.state_dict())
    with pytest.raises(UserError, match=r"step-000000003\.pt is no checkpoint.*: it holds (a |no )"):
        trainer.train(resume=True)
    assert all(torch.equal(value, before[name]) for name, value in trainer.method.state_dict().items())


def test_resume_of_another_architecture_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(UserError, match="another architecture"):
        make_trainer(tmp_path, "moco").train(resume=True)


@pytest.mark.parametrize("batches", [[], iter([{"x": DATA[:8]}])])
def test_batches_that_run_dry_end_the_run_with_an_error(tmp_path, batches):
    trainer = make_trainer(tmp_path)
    trainer.batches = batches
    with pytest.raises(TrainingError, match=r"of 12 `batches` yields nothing\. No checkpoint was written yet"):
        trainer.train()


def test_one_empty_epoch_is_the_end_of_a_resumed_one(tmp_path):
    class ResumedAtTheEnd:
        epochs = 0

        def __iter__(self):
            self.epochs += 1
            return iter([{"x": DATA[:8]}] * 4 if self.epochs % 2 == 0 else [])

    trainer = make_trainer(tmp_path)
    trainer.batches = ResumedAtTheEnd()
    assert trainer.train()["steps"] == 12


def test_epochs_of_no_batches_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(UserError, match="`batches` is empty"):
        Trainer(trainer.method, trainer.updater.make_views, [], TrainerConfig(epochs=3), tmp_path)


def test_epochs_are_counted_in_batches(tmp_path):
    assert make_trainer(tmp_path, steps=None, epochs=3).train()["steps"] == 12


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)
    real_views = trainer.updater.make_views

    def break_later(batch):
        views = real_views(batch)
        return Views(tuple(v * math.nan for v in views.inputs)) if trainer.step == 6 else views

    trainer.updater.make_views = break_later
    with pytest.raises(TrainingError, match=r"Step 7: `first` holds NaN.*step-000000005\.pt, is intact"):
        trainer.train()
    assert trainer.checkpoints.load_newest()["step"] == 5
    assert losses(tmp_path)[-1][0] == 6


def test_a_loss_that_overflows_stops_too(tmp_path):
    trainer = make_trainer(tmp_path)
    forward = trainer.method.forward
    trainer.method.forward = lambda views: dataclasses.replace(forward(views), loss=torch.tensor(math.inf))
    trainer.updater.accelerator.backward = lambda loss: None
    with pytest.raises(TrainingError, match=r"loss is inf at step 1\. No checkpoint was written yet"):
        trainer.train()


def test_schedule_warms_up_and_falls_like_a_cosine():
    config = TrainerConfig(learning_rate=2.0, warmup_share=0.1)
    rates = [scheduled_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_weight_decay_spares_biases_and_norms(kind, encoder):
    optimizer = build_optimizer(SimCLR(encoder), TrainerConfig(optimizer=kind, weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in spared["params"])
    assert all(p.ndim > 1 for p in decayed["params"])


def test_key_encoder_is_not_in_the_optimizer(encoder):
    method = MoCo(encoder)
    trained = {p for group in build_optimizer(method, TrainerConfig()).param_groups for p in group["params"]}
    assert not trained & set(method.momentum_encoder.parameters())


def test_updater_equals_the_steps_written_out(encoder):
    method = SimCLR(encoder)
    other = copy.deepcopy(method)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    updater = Updater(method, torch.optim.SGD(method.parameters(), 0.1), NoisyViews())
    hand_views = NoisyViews()
    for _ in range(3):
        optimizer.zero_grad()
        metrics = updater.step({"x": DATA})
        loss = other(hand_views({"x": DATA})).loss
        loss.backward()
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item())
        assert not metrics["loss"].requires_grad
    for mine, hand in zip(method.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, hand)


def test_gradients_are_clipped(encoder):
    method = SimCLR(encoder)
    updater = Updater(method, torch.optim.SGD(method.parameters(), 0.0), NoisyViews(), gradient_clip=1e-3)
    assert float(updater.step({"x": DATA})["gradient_norm"]) > 1e-3
    norm = torch.stack([p.grad.norm() for p in method.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_bf16_runs_the_encoder_in_half_precision_and_the_loss_in_full(encoder):
    seen = []
    encoder.layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    method = SimCLR(encoder)
    accelerator = make_accelerator("bf16", "cpu")
    updater = Updater(method, torch.optim.SGD(method.parameters(), 0.1), NoisyViews(), accelerator)
    assert updater.step({"x": DATA})["loss"].dtype == torch.float32
    assert seen == [torch.bfloat16]
    make_accelerator("no", "cpu")


def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        make_accelerator("fp16", "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps = 0"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"warmup_share": 1.0}, "--warmup-share"),
        ({"checkpoint_every": 0}, "--checkpoint-every"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        TrainerConfig(**options)


def test_moco_reads_the_queue_before_it_writes(encoder):
    method = MoCo(encoder, MoCoConfig(queue_size=16))
    views = NoisyViews()({"x": DATA})
    method(views)
    assert len(method.queue) == 0, "forward never writes"
    method.after_step()
    assert len(method.queue) == 16
    method.eval()
    method(views)
    held = method.queue.features().clone()
    method.after_step()
    assert torch.equal(held, method.queue.features()), "nor does evaluation leave keys behind"


def test_an_encoder_without_feature_dim_is_named():
    with pytest.raises(UserError, match="Linear has no integer `feature_dim`"):
        SimCLR(torch.nn.Linear(2, 2))


def test_the_schedule_is_what_the_optimizer_gets(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.5, warmup_share=0.25)
    real_step, seen = trainer.updater.step, []

    def step(batch):
        seen.append([group["lr"] for group in trainer.updater.optimizer.param_groups])
        return real_step(batch)

    trainer.updater.step = step
    trainer.train()
    assert seen == [[scheduled_rate(trainer.config, number, 12)] * 2 for number in range(12)]


def test_a_run_is_not_trained_over(tmp_path):
    make_trainer(tmp_path).train()
    before = losses(tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        make_trainer(tmp_path, steps=5).train()
    assert losses(tmp_path) == before


def test_a_finished_run_gets_its_encoder_back(tmp_path):
    make_trainer(tmp_path).train()
    encoder = (tmp_path / "encoder.safetensors").read_bytes()
    (tmp_path / "encoder.safetensors").unlink()
    result = make_trainer(tmp_path).train(resume=True)
    assert (tmp_path / "encoder.safetensors").read_bytes() == encoder
    assert result["loss"] == losses(tmp_path)[-1][1]


def test_ruined_weights_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_every=1, diagnose=False)
    real_step = trainer.updater.step

    def step(batch):
        metrics = real_step(batch)
        if trainer.step == 3:
            with torch.no_grad():
                next(trainer.method.parameters()).fill_(math.nan)
        return metrics

    trainer.updater.step = step
    with pytest.raises(TrainingError, match=r"After step 4 the weight .* holds NaN.*step-000000003\.pt, is intact"):
        trainer.train()
    assert trainer.checkpoints.load_newest()["step"] == 3


def test_a_second_updater_of_the_same_precision_leaves_the_first_as_it_was():
    first = make_accelerator("bf16", "cpu")
    make_accelerator("bf16", "cpu")
    assert first.mixed_precision == "bf16"
    assert make_accelerator("no", "cpu").mixed_precision == "no"


@pytest.mark.parametrize(("part", "value"), [("random", {}), ("optimizer", {}), ("views", None), ("random", [1])])
def test_a_checkpoint_that_is_damaged_inside_is_named(tmp_path, part, value):
    make_trainer(tmp_path).train()
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    state = torch.load(newest, weights_only=True)
    torch.save({**state, "step": 5, part: value}, newest)
    with pytest.raises(
        UserError, match=rf"(?s)The checkpoint .*{newest.name} is damaged .*resume from the one before it"
    ):
        make_trainer(tmp_path).train(resume=True)
