import math

import pytest
import torch
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.views import Views
from contrastive_mm.vision.few_labels.classifiers import Classifier
from contrastive_mm.vision.few_labels.distillation import (
    Distillation,
    DistillationConfig,
    distillation_loss,
    labelled_distillation_loss,
)
from contrastive_mm.vision.few_labels.fine_tuning import FineTuning
from contrastive_mm.vision.few_labels.labelled import UNLABELLED


def probabilities(scores, temperature):
    largest = max(scores)
    weights = [math.exp((score - largest) / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


def distilled(student, teacher, temperature):
    """Equation 2 for one image."""
    taught, learnt = probabilities(teacher, temperature), probabilities(student, temperature)
    return -sum(p * math.log(q) for p, q in zip(taught, learnt, strict=True))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_distillation_is_equation_2(temperature, generator):
    student, teacher = (torch.randn(5, 4, generator=generator) for _ in range(2))
    rows = zip(student.double().tolist(), teacher.double().tolist(), strict=True)
    expected = sum(distilled(s, t, temperature) for s, t in rows) / 5
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("teacher_share", [0.0, 0.3, 1.0])
def test_distillation_with_labels_is_equation_3(teacher_share, generator):
    student, teacher = (torch.randn(5, 4, generator=generator) for _ in range(2))
    labels = [2, UNLABELLED, 0, UNLABELLED, 3]
    total = 0.0
    for s, t, label in zip(student.double().tolist(), teacher.double().tolist(), labels, strict=True):
        if label != UNLABELLED:
            total -= (1 - teacher_share) * math.log(probabilities(s, 1.0)[label])
        total += teacher_share * distilled(s, t, 2.0)
    loss = labelled_distillation_loss(student, teacher, torch.tensor(labels), 2.0, teacher_share)
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)


def test_a_batch_without_a_label_has_a_finite_loss(generator):
    scores = torch.randn(3, 4, generator=generator)
    loss = labelled_distillation_loss(scores, scores, torch.full((3,), UNLABELLED), 1.0, 0.5)
    assert float(loss) == pytest.approx(0.5 * float(distillation_loss(scores, scores, 1.0)))


def test_fine_tuning_is_the_mean_cross_entropy(encoder, generator):
    method = FineTuning(Classifier(encoder, 4))
    images, labels = torch.randn(5, 6, generator=generator), [2, 1, 0, 0, 3]
    objective = method(Views((images,), num_global=1, labels=torch.tensor(labels)))
    scores = method.classifier(images).double().tolist()
    expected = -sum(math.log(probabilities(row, 1.0)[label]) for row, label in zip(scores, labels, strict=True)) / 5
    assert float(objective.loss.detach()) == pytest.approx(expected, rel=1e-5)
    right = [max(range(4), key=row.__getitem__) == label for row, label in zip(scores, labels, strict=True)]
    assert float(objective.metrics["training_accuracy"]) == pytest.approx(sum(right) / 5)


class NormalisedEncoder(nn.Module):
    feature_dim = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, inputs):
        return self.layers(inputs)


def test_the_teacher_is_frozen_and_the_student_learns(generator):
    student, teacher = (Classifier(NormalisedEncoder(), 4) for _ in range(2))
    method = Distillation(student, teacher)
    method.train()
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    begun = {name: value.clone() for name, value in student.state_dict().items()}
    images = torch.randn(16, 6, generator=generator)
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in student.parameters()}
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        method(Views((images,), num_global=1)).loss.backward()
        optimizer.step()
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert not any(torch.equal(value, begun[name]) for name, value in student.state_dict().items())


def test_teacher_and_student_must_tell_the_same_classes_apart(encoder):
    with pytest.raises(UserError, match=r"4 classes apart and its teacher 5"):
        Distillation(Classifier(encoder, 4), Classifier(encoder, 5))


def test_labels_with_a_share_are_asked_for(encoder, generator):
    method = Distillation(Classifier(encoder, 4), Classifier(encoder, 4), DistillationConfig(teacher_share=0.5))
    images = torch.randn(3, 6, generator=generator)
    with pytest.raises(UserError, match="--teacher-share"):
        method(Views((images,), num_global=1))
    with pytest.raises(UserError, match="works on 1 view"):
        method(Views((images, images)))
    with pytest.raises(UserError, match="batches with a 'label'"):
        FineTuning(Classifier(encoder, 4))(Views((images,), num_global=1))
