import json

import pytest

from contrastive_mm.evaluation import KeptResults

SUBJECT = {"encoder": "abc", "sizes": (3, 4)}


def test_a_result_is_found_again_under_equal_settings_only(tmp_path):
    path = tmp_path / "evaluation.json"
    kept = KeptResults(path, SUBJECT)
    kept.put("knn", {"k": 3, "shares": (0.1, 1)}, {"score": 0.5, 7: 1.0})
    again = KeptResults(path, SUBJECT)
    assert again.find("knn", {"k": 3, "shares": (0.1, 1)}) == {"score": 0.5, "7": 1.0}
    assert again.find("knn", {"k": 4, "shares": (0.1, 1)}) is None
    assert again.find("linear", {}) is None
    assert KeptResults(path, SUBJECT, overwrite=True).find("knn", {"k": 3, "shares": (0.1, 1)}) is None


def test_results_of_another_subject_are_dropped_and_the_rest_of_the_file_stays(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"step": 5, "scores": {"a": 1}}))
    KeptResults(path, SUBJECT).put("knn", {}, 1)
    other = KeptResults(path, SUBJECT | {"encoder": "def"})
    assert other.results == {}
    assert "knn" in json.loads(path.read_text())["protocols"], "nothing is lost before there is something new"
    other.put("linear", {}, 2)
    other.write(step=6)
    content = json.loads(path.read_text())
    assert (content["step"], content["scores"]) == (6, {"a": 1})
    assert list(content["protocols"]) == ["linear"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"protocols": 3}', "null"])
def test_a_file_that_holds_something_else_is_begun_anew(tmp_path, text):
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    kept = KeptResults(path, SUBJECT)
    assert kept.find("knn", {}) is None
    kept.put("knn", {}, 1)
    assert KeptResults(path, SUBJECT).results == {"knn": 1}
